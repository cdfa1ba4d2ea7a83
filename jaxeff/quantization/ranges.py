"""The range of activations, from calibration data.

The scale with which activations are rounded must be known before they arrive. Of what
flows into each weight in each batch we keep the largest magnitude, and how often each
magnitude occurs below that.

Sources: averages over batches: Jacob et al. 2018, arXiv:1712.05877, section 3.1;
entropy: Migacz 2017, "8-bit inference with TensorRT" (GTC).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxeff import tree
from jaxeff.program import check_batches, check_values, observe, Site

from .choice import Choice
from .formats import Format
from .grids import Grid, named

BINS = 2048
_TRIED = 128  # ranges that "mse" and "entropy" compare


def activation_scales(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any] | None,
    choices: Iterable[Choice],
) -> dict[str, Float[Array, "..."]]:
    """For each weight whose format has a range, the scale of what it meets.

    A weight that is used several times has the largest range of all. Where a scan
    slices it, each slice has a range of its own.

    Args:
        fn: `fn(params, *batch)`.
        params: its weights.
        batches: tuples of arguments, checked here; None where no format has a range.
        choices: a format for each weight.

    Returns:
        By path; of the weight's rank, with length 1 but where a scan slices it.

    Raises:
        ValueError: there is no data, a batch is no tuple, the weights have no values,
            or what flows into one is not finite.
    """
    formats = {
        c.path: c.format
        for c in choices
        if isinstance(c.format, Format) and c.format.range
    }
    if not formats:
        return {}
    given = list(batches or ())
    if not given:
        raise ValueError(
            f"the range of what {next(iter(formats))} meets is found from calibration "
            "data: give `batches=`, an iterable of tuples of arguments."
        )
    check_values(params, "the range of activations")
    fitted = any(f.range not in ("minmax", "average") for f in formats.values())
    counted = _histogram if fitted else _top
    seen, sites = _over(fn, params, check_batches(given), formats, counted)
    for site in sites:
        if not np.isfinite(seen[site.name].tops).all():
            raise ValueError(
                f"what flows into {site.path} at {site.source} is not finite: check "
                "the batches and the model."
            )
    found: dict[str, np.ndarray] = {}
    shapes = {path: tuple(x.shape) for path, x in tree.paths(params).items()}
    for site in sites:
        fmt = formats[site.path]
        grid = named(fmt.activations or "")
        tops, counts = seen[site.name]
        if fmt.range == "minmax":
            end = tops.max(0)
        elif fmt.range == "average":
            end = tops.mean(0)
        else:
            end = np.zeros(tops.shape[1:])
            for at in np.ndindex(end.shape):  # the turns of scans
                here = (slice(None), *at)
                end[at] = _end(*_together(tops[here], counts[here]), fmt, grid)
        scale = np.where(end > 0, end, 1.0) / grid.largest
        scale = _by_slice(np.asarray(scale), site, shapes[site.path])
        before = found.get(site.path)
        found[site.path] = scale if before is None else np.maximum(before, scale)
    return {path: jnp.asarray(x, jnp.float32) for path, x in found.items()}


class _Seen(NamedTuple):
    """Magnitudes that flow into a weight, in each batch and each turn of a scan."""

    tops: Float[np.ndarray, "batches ..."]
    counts: Int[np.ndarray, "batches ... bins"]  # in equal parts of 0 ... top


def _over(
    fn: Callable,
    params: PyTree,
    batches: list[tuple],
    weights: Mapping[str, Any],
    counted: Callable[[Array], tuple[Array, Array]],
) -> tuple[dict[str, _Seen], list[Site]]:
    """What is seen at each site; and the sites."""

    def look(site: Site, x: Array) -> tuple[Array, Array]:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.zeros(1)
        return counted(jnp.abs(x.astype(jnp.float32)))

    run = jax.jit(
        lambda params, *batch: observe(fn, look, weights=[*weights])(params, *batch)[1]
    )
    values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    sites: list[Site] = []
    for batch in batches:
        seen = run(params, *batch)
        sites = [s for s in seen.sites if s.primitive != "gather"]
        for site in sites:
            top, counts = map(np.asarray, seen.values[site.name])
            values.setdefault(site.name, []).append((top.astype(np.float64), counts))
    return {
        name: _Seen(*map(np.stack, zip(*each, strict=True)))
        for name, each in values.items()
    }, sites


def _top(x: Float[Array, "..."]) -> tuple[Float[Array, ""], Int[Array, " bins"]]:
    """The largest of some magnitudes, where no histogram is asked for."""
    return jnp.max(x), jnp.zeros(0, jnp.int32)


def _histogram(x: Float[Array, "..."]) -> tuple[Float[Array, ""], Int[Array, " bins"]]:
    """The largest of some magnitudes, and how many lie in each equal part below it.

    The end is that of this batch and this turn of a scan: that of all turns would
    leave a few bins to what is small.
    """
    top = jnp.max(x)
    at = (x / jnp.maximum(top, 1e-30) * BINS).astype(jnp.int32)
    at = jnp.clip(at, 0, BINS - 1).reshape(-1)
    # In integers: a float32 stops counting at 2^24.
    return top, jnp.zeros(BINS, jnp.int32).at[at].add(1)


def _together(
    tops: Float[np.ndarray, " batches"], counts: Int[np.ndarray, "batches bins"]
) -> tuple[Int[np.ndarray, " bins"], float]:
    """One histogram of several, up to the largest of their ends; and that end.

    What lies in a bin counts as spread evenly: no end is larger, so no bin is wider,
    and nothing moves by more than a bin.
    """
    end = float(tops.max())
    edges = np.linspace(0, end, BINS + 1)
    total = np.zeros(BINS, np.int64)
    for top, count in zip(tops, counts, strict=True):
        below = np.concatenate([[0], np.cumsum(count, dtype=np.int64)])
        if top < end:
            at = np.interp(edges, np.linspace(0, top, BINS + 1), below)
            below = np.rint(at).astype(np.int64)
        total += np.diff(below)
    return total, end


def _end(counts: np.ndarray, end: float, format: Format, grid: Grid) -> float:
    """The largest magnitude that the grid is to reach, from a histogram up to `end`."""
    if counts.sum() == 0 or end == 0:
        return end
    if not isinstance(format.range, str):
        over = np.cumsum(counts) >= counts.sum() * format.range / 100
        return end * (int(np.argmax(over)) + 1) / BINS
    ends = end * np.arange(1, _TRIED + 1) / _TRIED
    lost = _squared_error if format.range == "mse" else _divergence
    errors = [lost(counts, end, e, grid) for e in ends]
    return float(ends[int(np.argmin(errors))])


def _centers(end: float) -> np.ndarray:
    return (np.arange(BINS) + 0.5) * (end / BINS)


def _nearest(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Index of the nearest of the grid's numbers, of which `x` is at least 0."""
    positive = np.asarray([v for v in grid.levels if v >= 0])
    return np.searchsorted((positive[1:] + positive[:-1]) / 2, x)


def _squared_error(counts: np.ndarray, end: float, at: float, grid: Grid) -> float:
    x, scale = _centers(end), at / grid.largest
    positive = np.asarray([v for v in grid.levels if v >= 0])
    near = positive[_nearest(x / scale, grid)] * scale
    return float(np.sum(counts * (near - x) ** 2))


def _divergence(counts: np.ndarray, end: float, at: float, grid: Grid) -> float:
    """KL from the magnitudes, clipped at `at`, to what the grid makes of them."""
    n = max(1, round(BINS * at / end))
    p = counts[:n].astype(np.float64)
    p[-1] += counts[n:].sum()
    code = _nearest(_centers(end)[:n] * (grid.largest / at), grid)
    there = counts[:n] > 0
    size = np.bincount(code)
    mass, filled = (
        np.bincount(code, weights=w, minlength=len(size)) for w in (counts[:n], there)
    )
    q = np.where(there, mass[code] / np.maximum(filled[code], 1), 0)
    # A magnitude that the grid leaves nothing for counts as if there were a trace.
    p, q = p / p.sum(), q + 1e-9 * q.sum() + 1e-30
    q = q / q.sum()
    return float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-30) / q), 0)))


def _by_slice(scale: np.ndarray, site: Site, shape: tuple[int, ...]) -> np.ndarray:
    """The scale in the rank of the weight: one for each slice that scans take."""
    turns = scale.ndim
    sliced = all(d in site.batch for d in range(turns))
    if turns and sliced and scale.shape == shape[:turns]:
        return scale.reshape(*scale.shape, *[1] * (len(shape) - turns))
    return scale.max().reshape([1] * len(shape))
