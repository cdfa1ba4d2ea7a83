"""The range of activations, from calibration data.

The scale with which activations are rounded must be known before they arrive. What
flows into each weight is looked at twice: for its largest magnitude, and for how
often each magnitude occurs below that.

Sources: averages over batches: Jacob et al. 2018, arXiv:1712.05877, section 3.1;
entropy: Migacz 2017, "8-bit inference with TensorRT" (GTC).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import observe, Site

from .choice import Choice
from .formats import Format
from .grids import Grid, named

BINS = 2048
_TRIED = 128  # ranges that "mse" and "entropy" compare


def activation_scales(
    fn: Callable,
    params: PyTree,
    batches: Iterable[tuple] | None,
    choices: Iterable[Choice],
) -> dict[str, Float[Array, "..."]]:
    """For each weight whose format has a range, the scale of what it meets.

    A weight that is used several times has the largest range of all. Where a scan
    slices it, each slice has a range of its own.

    Args:
        fn: `fn(params, *batch)`.
        params: its weights.
        batches: tuples of arguments; None where no format has a range.
        choices: a format for each weight.

    Returns:
        By path; of the weight's rank, with length 1 but where a scan slices it.

    Raises:
        ValueError: there is no data, or what flows into a weight is not finite.
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
    tops, sites = _over(fn, params, given, formats, lambda site, x: jnp.abs(x).max())
    for site in sites:
        if not np.isfinite(np.stack(tops[site.name])).all():
            raise ValueError(
                f"what flows into {site.path} at {site.source} is not finite: check "
                "the batches and the model."
            )
    ends = {name: float(np.max(x)) for name, x in tops.items()}
    needs = any(f.range not in ("minmax", "average") for f in formats.values())
    counts: dict[str, list[np.ndarray]] = {}
    if needs:
        count = lambda site, x: _histogram(x, ends[site.name])
        counts, _ = _over(fn, params, given, formats, count)
    found: dict[str, np.ndarray] = {}
    shapes = {path: tuple(x.shape) for path, x in tree.paths(params).items()}
    for site in sites:
        fmt = formats[site.path]
        grid = named(fmt.activations or "")
        top = np.stack(tops[site.name]).astype(np.float64)
        if fmt.range == "minmax":
            end = top.max(0)
        elif fmt.range == "average":
            end = top.mean(0)
        else:
            total = np.sum(counts[site.name], axis=0, dtype=np.float64)
            one = lambda c, e=ends[site.name], f=fmt, g=grid: _end(c, e, f, g)
            end = np.apply_along_axis(one, -1, total)[..., 0]
        scale = np.where(end > 0, end, 1.0) / grid.largest
        scale = _by_slice(np.asarray(scale), site, shapes[site.path])
        before = found.get(site.path)
        found[site.path] = scale if before is None else np.maximum(before, scale)
    return {path: jnp.asarray(x, jnp.float32) for path, x in found.items()}


def _over(
    fn: Callable,
    params: PyTree,
    batches: list[tuple],
    weights: Mapping[str, Any],
    statistic: Callable[[Site, Array], Array],
) -> tuple[dict[str, list[np.ndarray]], list[Site]]:
    """The statistic at each site, of each batch; and the sites."""

    def look(site: Site, x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(())
        return statistic(site, x.astype(jnp.float32))

    run = jax.jit(
        lambda params, *batch: observe(fn, look, weights=[*weights])(params, *batch)[1]
    )
    values: dict[str, list[np.ndarray]] = {}
    sites: list[Site] = []
    for batch in batches:
        seen = run(params, *batch)
        sites = [s for s in seen.sites if s.primitive != "gather"]
        for site in sites:
            values.setdefault(site.name, []).append(np.asarray(seen.values[site.name]))
    return values, sites


def _histogram(x: Array, end: float) -> Float[Array, " bins"]:
    """How many magnitudes lie in each of equal parts of 0 ... end."""
    at = jnp.clip(jnp.abs(x) * (BINS / max(end, 1e-30)), 0, BINS - 1).astype(jnp.int32)
    return jnp.zeros(BINS, jnp.float32).at[at.reshape(-1)].add(1)


def _end(counts: np.ndarray, end: float, format: Format, grid: Grid) -> np.ndarray:
    """The largest magnitude that the grid is to reach, from a histogram up to `end`."""
    if counts.sum() == 0 or end == 0:
        return np.array([end])
    if not isinstance(format.range, str):
        over = np.cumsum(counts) >= counts.sum() * format.range / 100
        return np.array([end * (np.argmax(over) + 1) / BINS])
    ends = end * np.arange(1, _TRIED + 1) / _TRIED
    lost = _squared_error if format.range == "mse" else _divergence
    errors = [lost(counts, end, e, grid) for e in ends]
    return ends[[int(np.argmin(errors))]]


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
    p = counts[:n].copy()
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
