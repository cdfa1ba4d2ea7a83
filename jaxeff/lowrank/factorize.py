"""Replaces weights of a function, by pattern, by two thin factors.

How a weight is cut in two follows from how the function uses it: the dims that a
product sums over on one side, those that it puts out on the other. A kernel of a
convolution is cut at its output channels, which makes two convolutions of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import (
    equations,
    is_leaf,
    lift,
    lift_report,
    shapes,
    Site,
    trace,
    unlift,
)

from .factored import Factored
from .svd import check_rank, factor_array, matrix_shape, Rank, rank_number

Ranks = Rank | Mapping[str, Rank]


ALREADY = "it is compressed already"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a weight is cut in two: (batch dims, row dims, column dims), in order."""

    batch: int
    rows: int


def factorize(
    fn: Callable, params: PyTree, *args: Any, ranks: Ranks
) -> tuple[Callable, PyTree]:
    """The function, and weights replaced by two thin factors where that is smaller.

    Args:
        fn: `fn(params, *args)`.
        params: its weights. Those that are compressed stay. May be shapes.
        args: example inputs, or their shapes.
        ranks: one rank for every weight, or pattern -> rank, where the first
            pattern that matches a weight counts. An int is a count, a float in (0, 1]
            a fraction of the full rank, `energy(0.9)` what it takes to keep that
            much. A weight stacked for a scan gets one rank for all its layers, for
            `energy` the largest.

    Returns:
        `lift(fn)` and the new weights. A weight whose factors would be no smaller, or
        would be multiplied out before they are used, stays as it is: `report`, given
        the same arguments, says which and why.

    Raises:
        ValueError: a rank is not positive, a pattern matches no weight, or none
            that can be cut in two and becomes smaller.
    """
    return lift(fn), _replace(params, choose(fn, params, args, ranks))


def _replace(params: PyTree, chosen: Mapping[str, Factored | str]) -> PyTree:
    new = {path: x for path, x in chosen.items() if isinstance(x, Factored)}
    return tree.replaced(params, new, is_leaf)


def choose(
    fn: Callable, params: PyTree, args: tuple, ranks: Ranks
) -> dict[str, Factored | str]:
    """For each weight its factors, or why it stays; see `factorize`."""
    ranks = ranks if isinstance(ranks, Mapping) else {"**": ranks}
    for rank in ranks.values():
        check_rank(rank)
    weights = tree.paths(params, is_leaf)
    asked = tree.assign(ranks, weights)
    program = trace(unlift(fn), shapes(params), *args)
    at = {where: eqn for where, eqn, _ in equations(program.jaxpr)}
    uses: dict[str, list[tuple[Site, JaxprEqn]]] = {path: [] for path in weights}
    for site in program.sites:
        uses[site.path].append((site, at[site.where]))
    out: dict[str, Factored | str] = {}
    for path, w in weights.items():
        cut = cut_of(w, uses[path])
        if isinstance(cut, str) or path not in asked:
            out[path] = cut if isinstance(cut, str) else "no pattern matches it"
        else:
            out[path] = _factor(w, cut, asked[path], path)
    for use in lift_report(lift(fn), _replace(params, out), *args):
        if not use.native and isinstance(out[use.path], Factored):
            what = f"{use.primitive} at {use.source}"
            out[use.path] = f"its factors would be multiplied out for {what}"
    reasons = {path: x if isinstance(x, str) else "" for path, x in out.items()}
    for pattern in ranks:
        done = any(out[path] == ALREADY for path in tree.match(pattern, weights))
        way_out = "Choose other weights or a smaller rank."
        if done:
            way_out = "Factorize before quantizing, and each weight once."
        tree.check_some([pattern], reasons, does="factors", way_out=way_out)
    return out


def cut_of(w: Any, uses: list[tuple[Site, JaxprEqn]]) -> Cut | str:
    """How to cut a weight so that every use of it is cheaper, or why it can't be."""
    if is_leaf(w):
        return ALREADY
    if not tree.is_array(w) or not jnp.issubdtype(w.dtype, jnp.floating):
        return "it is no floating-point array"
    if not uses:
        return "no product, convolution or look-up uses it"
    cuts = {_cut_at(site, eqn, w.ndim) for site, eqn in uses}
    reasons = [cut for cut in cuts if isinstance(cut, str)]
    if reasons:
        return reasons[0]
    return cuts.pop() if len(cuts) == 1 else "its uses would cut it in different places"


def _cut_at(site: Site, eqn: JaxprEqn, ndim: int) -> Cut | str:
    contract, output, batch = site.contract, site.output, site.batch
    if site.primitive == "gather":
        # A look-up of rows: the rows are one side, what they hold is the other.
        contract, batch = batch[-1:], batch[:-1]
    groups = ("feature_group_count", "batch_group_count")
    if any(eqn.params.get(name, 1) != 1 for name in groups):
        return "it is the kernel of a grouped convolution, whose groups share no factor"
    b = len(batch)
    if batch != tuple(range(b)) or set(contract) & set(output):
        return f"its dims {batch} are indexed or reshaped together with others"
    for rows, cols in ((contract, output), (output, contract)):
        if (*rows, *cols) == tuple(range(b, ndim)) and rows and cols:
            return Cut(b, len(rows))
    return f"its summed dims {contract} and output dims {output} are no two halves"


def _factor(w: Any, cut: Cut, rank: Rank, path: str) -> Factored | str:
    m, n = matrix_shape(w.shape, cut.rows, cut.batch)
    if isinstance(rank, int) and rank > min(m, n):
        return f"a {m} x {n} matrix has at most rank {min(m, n)}, and {rank} is asked"
    try:
        r = rank_number(w, rank, rows=cut.rows, batch=cut.batch)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if r * (m + n) >= m * n:
        return (
            f"rank {r} of a {m} x {n} matrix takes {r * (m + n):,} numbers, and the "
            f"matrix {m * n:,}"
        )
    make = lambda w: factor_array(w, r, rows=cut.rows, batch=cut.batch)
    return jax.eval_shape(make, w) if isinstance(w, jax.ShapeDtypeStruct) else make(w)
