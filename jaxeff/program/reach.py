"""What of a program's inputs its arrays depend on.

Inputs are marked, and marks spread along the equations. Whether an output still depends
on data: where a coupling has lost all its indices, the arrays that carried it are
empty, and what is summed over them is zero whatever the data are; a residual stream
goes on beside that, a plain chain of layers is cut. And which weights get a gradient
through an operand.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .interpret import is_inexact
from .trace import Program
from .walk import bodies, Body, equations, scan_counts, Where

Marks = frozenset[Any]
_NONE: Marks = frozenset()
_Found = list[tuple[Where, JaxprEqn, list[Marks]]] | None


def data_reaches(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> list[bool]:
    """For each output of a program whether it depends on data.

    Args:
        jaxpr: the program.
        data: for each input whether it is data.
    """
    filled = _Spread(reads=lambda v: v.aval.size > 0)
    marks = [frozenset([True]) if d else _NONE for d in data]
    return [bool(m) for m in filled.run(jaxpr, marks)]


def gradients_reach(
    program: Program,
) -> Iterator[tuple[JaxprEqn, list[frozenset[str]]]]:
    """The equations that matter, and what weights get a gradient through each operand.

    Not those within a `while`, out of which no gradient comes, nor within a
    `shard_map`, which the compiler does not share out.
    """
    spread = _Spread(
        reads=is_inexact,
        enters=lambda body: body.kind not in ("shard_map", "while"),
        passes=lambda eqn: eqn.primitive.name != "stop_gradient",
    )
    found: list[tuple[Where, JaxprEqn, list[Marks]]] = []
    marks = [_NONE if path is None else frozenset([path]) for path in program.weights]
    spread.run(program.jaxpr, marks, found)
    live = {where for where, _, _ in equations(program.jaxpr)}
    return ((eqn, given) for where, eqn, given in found if where in live)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spread:
    """How marks spread from the inputs of a program.

    Attributes:
        reads: whether a variable hands on the marks it has.
        enters: whether marks are followed through a body; else each output of its
            equation has all of the inputs' marks.
        passes: whether an equation hands on marks at all.
    """

    reads: Callable[[Var], bool]
    enters: Callable[[Body], bool] = lambda body: True
    passes: Callable[[JaxprEqn], bool] = lambda eqn: True

    def run(
        self,
        jaxpr: ClosedJaxpr,
        given: Sequence[Marks],
        found: _Found = None,
        where: Where = (),
    ) -> list[Marks]:
        """The marks of the outputs; those of each equation's operands go to `found`."""
        marks: dict[Var, Marks] = dict.fromkeys(jaxpr.jaxpr.constvars, _NONE)
        marks.update(zip(jaxpr.jaxpr.invars, given, strict=True))

        def read(v: Var | Literal) -> Marks:
            return marks[v] if isinstance(v, Var) and self.reads(v) else _NONE

        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            ins, here = [read(v) for v in eqn.invars], (*where, i)
            if found is not None:
                found.append((here, eqn, ins))
            inner = bodies(eqn, here)
            if inner and all(map(self.enters, inner)):
                outs = self._inside(eqn, ins, inner, found)
            else:
                every = _NONE.union(*ins) if self.passes(eqn) else _NONE
                outs = [every] * len(eqn.outvars)
            marks.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def _inside(
        self, eqn: JaxprEqn, given: list[Marks], inner: list[Body], found: _Found
    ) -> list[Marks]:
        kind = inner[0].kind
        if kind == "scan":
            return self._turns(inner[0], given, *scan_counts(eqn), found)
        if kind == "while":
            m = len(eqn.outvars)
            body = inner[-1]
            entering = [given[j] for j in body.operands]
            return self._turns(body, entering, len(entering) - m, m, found)
        several = [
            self.run(b.jaxpr, [given[j] for j in b.operands], found, b.where)
            for b in inner
        ]
        return [_NONE.union(*outs) for outs in zip(*several, strict=True)]

    def _turns(
        self, body: Body, given: list[Marks], consts: int, carried: int, found: _Found
    ) -> list[Marks]:
        """The outputs of a loop: what is carried may get more marks in a later turn."""
        carry = given[consts : consts + carried]
        while True:
            ins = [*given[:consts], *carry, *given[consts + carried :]]
            outs = self.run(body.jaxpr, ins)
            after = [a | b for a, b in zip(carry, outs[:carried], strict=True)]
            if after == carry:
                break
            carry = after
        if found is not None:
            self.run(body.jaxpr, ins, found, body.where)
        return [*carry, *outs[carried:]]
