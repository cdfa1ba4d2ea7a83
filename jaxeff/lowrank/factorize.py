"""Replaces weights by two thin factors: truncated SVD, the best of its rank.

How a weight is cut in two follows from how the function uses it: the dims that a
product sums over on one side, those that it puts out on the other. A kernel of a
convolution is cut at its output channels, which makes two convolutions of it.

Source: Eckart & Young 1936; for convolutions Zhang et al. 2015,
arXiv:1505.06798, section 3.1.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import is_leaf, lift, shapes, Site, trace, unlift

from .factored import Factored


@dataclasses.dataclass(frozen=True)
class Energy:
    """A rank by what it keeps; see `energy`."""

    fraction: float


def energy(fraction: float | int) -> Energy:
    """The smallest rank that keeps this fraction of the squared singular values.

    1 - `fraction` is then the squared relative error of the weight, at most.

    Raises:
        ValueError: `fraction` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the energy to keep is a fraction in (0, 1], got {fraction}.")
    return Energy(float(fraction))


Rank = int | float | Energy


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a weight is cut in two: (batch dims, row dims, column dims), in order."""

    batch: int
    rows: int

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the matrix it makes of that shape."""
        n = self.batch + self.rows
        return math.prod(shape[self.batch : n]), math.prod(shape[n:])


def factorize(
    fn: Callable, params: PyTree, *args: Any, ranks: Mapping[str, Rank]
) -> tuple[Callable, PyTree]:
    """The function, and weights replaced by two thin factors where that is smaller.

    Args:
        fn: `fn(params, *args)`.
        params: its weights, arrays.
        args: example inputs, or their shapes.
        ranks: pattern -> rank; the first pattern that matches a weight counts. An
            int is a count, a float in (0, 1] a fraction of the full rank,
            `energy(0.9)` what it takes to keep that much. A weight stacked for a
            scan gets one rank for all its layers, for `energy` the largest.

    Returns:
        `lift(fn)` and the new weights. A weight whose factors would be no smaller
        stays as it is.

    Raises:
        ValueError: a rank is not positive or larger than the full one, a pattern
            matches no weight, or none that can be cut in two and becomes smaller.
    """
    for rank in ranks.values():
        _check(rank)
    weights = tree.paths(params, is_leaf)
    uses: dict[str, list[Site]] = {}
    for site in trace(unlift(fn), shapes(params), *args).sites:
        uses.setdefault(site.path, []).append(site)
    asked = tree.assign(ranks, weights)
    new: dict[str, Factored] = {}
    reasons: dict[str, str] = {}
    for path, rank in asked.items():
        cut = _cut(weights[path], uses.get(path, []))
        if isinstance(cut, str):
            reasons[path] = cut
            continue
        result = _factor(weights[path], cut, rank, path)
        if isinstance(result, str):
            reasons[path] = result
        else:
            new[path] = result
    for pattern in ranks:
        matched = tree.match(pattern, weights)
        if not any(path in new for path in matched):
            why = lambda p: reasons.get(p, "an earlier pattern has it")
            said = "; ".join(f"{p}: {why(p)}" for p in matched[:4])
            raise ValueError(
                f"pattern {pattern!r} factors none of the {len(matched)} weights it "
                f"matches: {said}. Choose other weights or a smaller rank."
            )
    replace = lambda keypath, x: new.get(tree.path_name(keypath), x)
    params = jax.tree_util.tree_map_with_path(replace, params, is_leaf=is_leaf)
    return lift(fn), params


def _check(rank: Rank) -> None:
    if isinstance(rank, Energy):
        return
    if isinstance(rank, bool) or not (
        rank >= 1 if isinstance(rank, int) else 0 < rank <= 1
    ):
        raise ValueError(
            "a rank is a whole number from 1 on, a fraction of the full rank in "
            f"(0, 1], or energy(fraction), got {rank!r}."
        )


def _cut(w: Any, sites: list[Site]) -> Cut | str:
    """How to cut a weight so that every use of it is cheaper, or why it can't be."""
    if is_leaf(w):
        return "it is compressed already"
    if not tree.is_array(w) or not jnp.issubdtype(w.dtype, jnp.floating):
        return "it is no floating-point array"
    if not sites:
        return "no product, convolution or look-up uses it"
    cuts = {_cut_of(site, w.ndim) for site in sites}
    if None in cuts:
        return "its summed and its output dims do not lie side by side"
    if len(cuts) > 1:
        return "its uses would cut it in different places"
    (cut,) = cuts
    assert cut is not None
    return cut


def _cut_of(site: Site, ndim: int) -> Cut | None:
    contract, output, batch = site.contract, site.output, site.batch
    if site.primitive == "gather":
        # A look-up of rows: the rows are one side, what they hold is the other.
        contract, batch = batch, ()
    b = len(batch)
    if batch != tuple(range(b)) or set(contract) & set(output):
        return None
    for rows, cols in ((contract, output), (output, contract)):
        if (*rows, *cols) == tuple(range(b, ndim)) and rows and cols:
            return Cut(b, len(rows))
    return None


def _factor(w: Any, cut: Cut, rank: Rank, path: str) -> Factored | str:
    m, n = cut.sizes(tuple(w.shape))
    full = min(m, n)
    if isinstance(w, jax.ShapeDtypeStruct):
        if isinstance(rank, Energy):
            raise ValueError(
                f"energy(...) depends on the values of {path}, but only its shape is "
                "given. Name the rank as a number."
            )
        factors = None
    else:
        factors = _svd(w, cut)
    if isinstance(rank, Energy):
        assert factors is not None
        r = _rank_for(np.asarray(factors[1]), rank.fraction)
    elif isinstance(rank, int):
        r = rank
        if r > full:
            raise ValueError(
                f"the rank of {path} is at most {full} (it is {m} x {n}), got {r}."
            )
    else:
        r = max(1, round(rank * full))
    if r * (m + n) >= m * n:
        return (
            f"rank {r} of a {m} x {n} matrix takes {r * (m + n):,} numbers, and the "
            f"matrix {m * n:,}"
        )
    return _truncate(w, cut, r, factors)


def _svd(w: Float[Array, "..."], cut: Cut) -> tuple[Array, Array, Array]:
    m, n = cut.sizes(w.shape)
    # float32: LAPACK has no narrower type.
    matrix = w.reshape(*w.shape[: cut.batch], m, n).astype(jnp.float32)
    return jnp.linalg.svd(matrix, full_matrices=False)


def _rank_for(singular: np.ndarray, fraction: float) -> int:
    squares = singular.astype(np.float64) ** 2
    kept = np.cumsum(squares, -1) / np.maximum(squares.sum(-1, keepdims=True), 1e-300)
    # The last one is 1 up to rounding, so there is always an answer.
    enough = kept >= min(fraction, 1.0) - 1e-12
    enough[..., -1] = True
    return int(enough.argmax(-1).max()) + 1


def _truncate(w: Any, cut: Cut, r: int, factors: Any) -> Factored:
    b, n = cut.batch, cut.batch + cut.rows
    u_shape, v_shape = (*w.shape[:n], r), (*w.shape[:b], r, *w.shape[n:])
    if factors is None:
        u, v = (jax.ShapeDtypeStruct(s, w.dtype) for s in (u_shape, v_shape))
        return Factored(u, v, len(w.shape) - n)
    u, s, v = factors
    # Each factor takes the root, so that they train at one learning rate.
    root = jnp.sqrt(s[..., :r])
    u = (u[..., :r] * root[..., None, :]).reshape(u_shape)
    v = (v[..., :r, :] * root[..., :, None]).reshape(v_shape)
    return Factored(u.astype(w.dtype), v.astype(w.dtype), len(w.shape) - n)
