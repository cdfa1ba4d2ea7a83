"""How much each index of each coupling matters: what the weights alone say.

A score maps the traced program and the weights to one number for each index of
each coupling it can judge; the larger, the more it matters. Whatever multiplies
data and leaves with an index has a say: a channel's filter, and its row in the next
kernel. `gradients.py` and `outputs.py` have the scores that look at data. Anyone can
write another one: `program.couplings.sums` adds numbers for elements up.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import Program

Scores = Mapping[str, Any]  # for each coupling, by name, an array of its size
Score = Callable[[Program, PyTree], Scores]


def multiplying(program: Program, params: PyTree) -> dict[str, Array]:
    """The weights that multiply data, by path: kernels and tables.

    A large running variance says nothing about the channel that it normalises.
    """
    weights = tree.paths(params)
    return {
        path: weights[path] for path in dict.fromkeys(s.path for s in program.sites)
    }


def _wide(w: Any) -> np.ndarray:
    return np.asarray(w, np.result_type(np.asarray(w).dtype, np.float64))


def magnitude(order: int = 2) -> Score:
    """The size of what leaves: its p-norm, to the power of p.

    Args:
        order: p. 1: Li et al. 2017, arXiv:1608.08710, section 3.1; 2: the
            squared Euclidean norm.

    Raises:
        ValueError: `order` is below 1.
    """
    if order < 1:
        raise ValueError(
            f"the order of a norm is at least 1, got {order}: take 1 or 2."
        )

    def score(program: Program, params: PyTree) -> Scores:
        power = lambda w: np.abs(_wide(w)) ** order
        kernels = multiplying(program, params)
        return program.couplings.sums({p: power(w) for p, w in kernels.items()})

    return score


def norm_scale() -> Score:
    """The size of the scale of the norm behind a channel, |gamma|.

    It judges the couplings that have such a scale, of batch norms or others.

    Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3.
    """

    def score(program: Program, params: PyTree) -> Scores:
        weights = tree.paths(params)
        scales = {p: np.abs(_wide(weights[p])) for p in program.scales}
        with_scale = {
            c.name
            for c in program.couplings
            if any(path in scales for path, _ in c.members)
        }
        totals = program.couplings.sums(scales)
        return {name: x for name, x in totals.items() if name in with_scale}

    return score


def lamp() -> Score:
    """An index's squared norm, over those of all indices that are no smaller.

    It makes couplings comparable: the largest index of each has the score 1, so
    together with `scope="global"` no coupling loses it.

    Source: Lee et al. 2021, arXiv:2010.07611, equation 3 (there for single weights).
    """

    def score(program: Program, params: PyTree) -> Scores:
        return {name: _lamp(x) for name, x in magnitude(2)(program, params).items()}

    return score


def _lamp(squares: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:
    order = np.argsort(-squares, kind="stable")
    out = np.empty_like(squares)
    # A coupling that is zero altogether has nothing to compare.
    out[order] = squares[order] / np.maximum(np.cumsum(squares[order]), 1e-300)
    return out


def geometric_median() -> Score:
    """How far an index's filters are from the others': what is alike is redundant.

    The sum of the Euclidean distances to all other filters, over all the kernels
    that put the channel out.

    Source: He et al. 2019 (FPGM), arXiv:1811.00250, section 3.3.
    """

    def score(program: Program, params: PyTree) -> Scores:
        totals: dict[str, np.ndarray] = {}
        for name, filters in _filters(program, tree.paths(params)):
            squares = np.sum(np.abs(filters) ** 2, 1)
            products = (filters @ filters.conj().T).real
            apart = squares[:, None] + squares - 2 * products
            distance = np.sqrt(np.maximum(apart, 0)).sum(1)
            totals[name] = totals.get(name, 0) + distance
        return totals

    return score


def _filters(
    program: Program, weights: Mapping[str, Array]
) -> Iterator[tuple[str, Float[np.ndarray, "size _"]]]:
    """For each coupling and each kernel that puts it out, a row for each index."""
    outputs = dict.fromkeys((s.path, d) for s in program.sites for d in s.output)
    for path, dim in outputs:
        w = _wide(jnp.moveaxis(weights[path], dim, 0))
        for name, index in program.couplings.occurrences(path, dim):
            inside = np.flatnonzero(index >= 0)
            order = inside[np.argsort(index[inside], kind="stable")]
            yield name, w[order].reshape(index.max() + 1, -1)


def random(seed: int = 0) -> Score:
    """Chance: what every other score has to beat.

    Args:
        seed: of the numbers drawn.
    """

    def score(program: Program, params: PyTree) -> Scores:
        rng = np.random.default_rng(seed)
        return {c.name: rng.random(c.size) for c in program.couplings}

    return score


def arguments(batch: Any) -> tuple:
    """A batch as the arguments after the weights.

    Raises:
        ValueError: it is an array, whose rows would be taken for arguments.
    """
    if tree.is_array(batch):
        raise ValueError(
            f"a batch is a tuple of arguments, got an array of shape {batch.shape}: "
            "write `(x,)` where there is only one."
        )
    return tuple(batch)


def consumed(program: Program, values: Mapping[str, Any]) -> Scores:
    """The sum of `values` over what consumes each index, for each coupling.

    A coupling that nothing consumes (its weights are only added) takes all.
    """
    into: dict[str, np.ndarray] = {}
    for path, d in consumers(program):
        if path not in values:
            continue
        array = values[path]
        others = tuple(i for i in range(array.ndim) if i != d)
        line = np.asarray(array.sum(others), np.float64)
        for name, index in program.couplings.occurrences(path, d):
            total = into.setdefault(name, np.zeros(index.max() + 1))
            inside = index >= 0
            np.add.at(total, index[inside], line[inside])
    rest = [c.name for c in program.couplings.free if c.name not in into]
    kernels = {s.path: values[s.path] for s in program.sites if s.path in values}
    return {**into, **program.couplings.sums(kernels, names=rest)}


def consumers(program: Program) -> list[tuple[str, int]]:
    """(path of a weight, dim of it) where something is summed over."""
    return sorted({(s.path, d) for s in program.sites for d in s.contract})
