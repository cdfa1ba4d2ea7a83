"""A gradient that XLA gets wrong, so that nobody trains with it unawares.

Where the batch is split over some axes of a mesh and another axis holds copies, the
partitioner adds up the gradient of a grouped convolution's kernel over the copies too:
on two of them it is twice what it should be. Seen with jaxlib 0.10 and 0.12 on the CPU.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.sharding import Mesh

from jaxeff.program import (
    bodies,
    equations,
    is_inexact,
    Program,
    scan_counts,
    trace,
    Where,
)

from .mesh import BATCH_AXES


def grouped_weights(program: Program) -> list[str]:
    """The weights that get their gradient through the kernel of a grouped convolution.

    Where a kernel is computed (standardised, masked, made by other weights), the
    largest of those that it is computed from.
    """
    live = {where for where, _, _ in equations(program.jaxpr)}
    found: dict[str, None] = {}

    def visit(where: Where, eqn: JaxprEqn, given: Sequence[frozenset[str]]) -> None:
        if where in live and eqn.params.get("feature_group_count", 1) > 1 and given[1]:
            size = lambda path: program.shapes[path].size
            found[max(sorted(given[1]), key=size)] = None

    weights = [frozenset(() if p is None else (p,)) for p in program.weights]
    _follow(program.jaxpr, weights, visit)
    return list(found)


def _follow(
    jaxpr: ClosedJaxpr,
    given: Sequence[frozenset[str]],
    visit: Callable[[Where, JaxprEqn, Sequence[frozenset[str]]], None],
    where: Where = (),
) -> list[frozenset[str]]:
    """Calls `visit` with the weights that each operand passes a gradient on to."""
    nothing: frozenset[str] = frozenset()
    of: dict[Var, frozenset[str]] = dict(zip(jaxpr.jaxpr.invars, given, strict=True))

    def read(v: Var | Literal) -> frozenset[str]:
        known = isinstance(v, Var) and is_inexact(v)
        return of.get(v, nothing) if known else nothing

    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        ins, here = [read(v) for v in eqn.invars], (*where, i)
        visit(here, eqn, ins)
        every = nothing.union(*ins)
        if eqn.primitive.name == "stop_gradient":
            every = nothing
        outs = [every] * len(eqn.outvars)
        for body in bodies(eqn, here):
            # In a shard_map nothing is left to the partitioner, and no gradient comes
            # back out of a while.
            if body.kind in ("shard_map", "while"):
                continue
            entering = [ins[j] for j in body.operands]
            run = functools.partial(_follow, body.jaxpr, where=body.where)
            if body.kind == "scan":
                begin, n = scan_counts(eqn)
                carried, after = None, entering[begin : begin + n]
                while after != carried:  # what is carried may be of more after a turn
                    carried = entering[begin : begin + n] = after
                    leaving = run(entering, lambda *_: None)
                    pairs = zip(carried, leaving[:n], strict=True)
                    after = [a | b for a, b in pairs]
            leaving = run(entering, visit)
            if body.kind != "cond":
                outs = leaving
        of.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def copying_axes(mesh: Mesh, manual: Collection[str] = ()) -> list[str]:
    """The axes that hold copies while others share a batch.

    Args:
        mesh: any.
        manual: axes that a `shard_map` takes from the compiler.
    """
    wide = [a for a, n in mesh.shape.items() if n > 1 and a not in manual]
    copies = [a for a in wide if a not in BATCH_AXES]
    return copies if len(copies) < len(wide) else []


def check_grouped(
    paths: Iterable[str],
    mesh: Mesh,
    *,
    manual: Collection[str] = (),
    split: Callable[[str], Collection[str]] = lambda path: (),
) -> None:
    """Refuses a mesh on which the gradient of a grouped convolution would be wrong.

    Args:
        paths: from `grouped_weights`.
        mesh: for the function.
        manual: axes that a `shard_map` takes from the compiler.
        split: the axes over which the channels of a kernel are split, by its path.

    Raises:
        ValueError: as said.
    """
    copying = copying_axes(mesh, manual)
    for path in paths:
        left = [a for a in copying if a not in split(path)]
        if left:
            sharing = [a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1]
            raise ValueError(
                f"with the batch shared over {sharing[0]} and copies along {left[0]}, "
                f"XLA gets the gradient of grouped convolutions wrong, and {path} "
                f"is the kernel of one. Give the {mesh.shape[left[0]]} devices of "
                f"{left[0]} to {sharing[0]}."
            )


def check_function(
    fn: Callable, mesh: Mesh, *args: Any, manual: Collection[str] = (), **kwargs: Any
) -> None:
    """`check_grouped` for a function of weights and more; it is traced if need be."""
    if copying_axes(mesh, manual):
        program = trace(fn, *args, **kwargs)
        check_grouped(grouped_weights(program), mesh, manual=manual)
