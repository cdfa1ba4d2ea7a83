"""Whole residual branches leave: a model becomes less deep.

A branch is what a residual connection goes around: the couplings inside it can lose
all their indices, and the outputs still depend on the inputs. What is left of it are
its additive constants.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import Coupling, Couplings, dense, Program, shapes, trace, unlift

from .outputs import checked, relative_error
from .selection import Selection


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch that can leave.

    Attributes:
        couplings: the names of those inside it.
        weights: the paths of the multiplying weights that they belong to.
        error: the relative squared change of the outputs without it, on the data.
    """

    couplings: tuple[str, ...]
    weights: tuple[str, ...]
    error: float


def branches(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    only: tree.Patterns = "**",
) -> list[Branch]:
    """The branches of a model, the one that matters least first.

    The function is traced once for each coupling, and runs once for each branch and
    each batch.

    Args:
        fn: `fn(params, *args)`, as used for evaluation.
        params: its weights.
        args: example inputs, or their shapes.
        batches: tuples of arrays, the arguments after the weights.
        only: patterns; a branch counts if all its multiplying weights match.

    Raises:
        ValueError: a pattern matches no weight, there is no batch, or no branch.

    Source: the one-shot criterion of Kim et al. 2024 (shortened LLaMA),
        arXiv:2402.02834, section 3.1, with the outputs in the place of perplexity.
    """
    given, plain = checked(batches), unlift(fn)
    values = dense(params)
    program = trace(plain, shapes(params), *args)
    groups = _groups(program, args, set(tree.match(only, list(program.shapes))))
    if not groups:
        raise ValueError(
            f"no branch of this function can leave, among the weights that match "
            f"{only!r}: whatever loses all its indices cuts the outputs off. Only "
            "what a residual connection goes around can."
        )
    run = jax.jit(plain)
    wanted = [run(values, *batch) for batch in given]
    kernels = {s.path for s in program.sites}
    found = []
    for group in groups:
        names = tuple(c.name for c in group)
        without = _emptied(program.couplings, names).zeroed(values)
        errors = [
            float(relative_error(run(without, *batch), want))
            for batch, want in zip(given, wanted, strict=True)
        ]
        weights = sorted({p for c in group for p, _ in c.members} & kernels)
        found.append(Branch(names, tuple(weights), float(np.mean(errors))))
    return sorted(found, key=lambda b: b.error)


def select_depth(
    fn: Callable,
    params: PyTree,
    *args: Any,
    drop: int,
    batches: Iterable[tuple],
    only: tree.Patterns = "**",
) -> Selection:
    """Chooses the branches to leave out: those without which outputs change least.

    Args:
        drop: how many.
        fn, params, args, batches, only: as for `branches`.

    Returns:
        As from `select`.

    Raises:
        ValueError: as `branches` does, or there are not so many.
    """
    found = branches(fn, params, *args, batches=batches, only=only)
    if not 1 <= drop <= len(found):
        raise ValueError(
            f"drop counts branches, of which there are {len(found)} here, got {drop}. "
            f"The first: {', '.join(b.weights[0] for b in found[:4])}."
        )
    names = [name for branch in found[:drop] for name in branch.couplings]
    couplings = trace(unlift(fn), shapes(params), *args).couplings
    return _emptied(couplings, names).checked(fn, params, args)


def _emptied(couplings: Couplings, names: Sequence[str]) -> Selection:
    sizes = {c.name: c.size for c in couplings}
    return Selection(couplings, {name: np.zeros(sizes[name], bool) for name in names})


def _groups(program: Program, args: tuple, matched: set[str]) -> list[list[Coupling]]:
    """The couplings that can lose all, those that share a kernel together."""
    kernels = {s.path for s in program.sites}
    of = {c.name: {p for p, _ in c.members} & kernels for c in program.couplings.free}
    fn, form = program.call.fn, program.call.params

    def goes(couplings: Sequence[Coupling]) -> bool:
        chosen = _emptied(program.couplings, [c.name for c in couplings])
        return chosen.connected(fn, form, args)

    groups: list[list[Coupling]] = []
    for c in program.couplings.free:
        inside = of[c.name] and of[c.name] <= matched
        if not inside or not _fills(c, program.couplings) or not goes([c]):
            continue
        near = [g for g in groups if any(of[c.name] & of[other.name] for other in g)]
        joined = [c, *(other for g in near for other in g)]
        groups = [g for g in groups if g not in near] + [joined]
    return [g for g in groups if len(g) == 1 or goes(g)]


def _fills(c: Coupling, couplings: Couplings) -> bool:
    """Whether nothing is left of any dim that it is part of, if it leaves.

    A part of the residual stream, as the channels that a later stage adds, does not.
    """
    keep = {c.name: np.zeros(c.size, bool)}
    return all(not couplings.masks(path, keep)[d].any() for path, d in c.members)
