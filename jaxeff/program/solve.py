"""Finds, for every array of a program, which of its dims are the same.

Bodies are entered at each call, so the arrays of a body called twice have two
sets of dims. The layers of a `scan` run one body, and so share their dims.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .dims import Dim, fix
from .rule import because, Dims, fixed, unite_all
from .rules import rule_of
from .source import inside
from .walk import bodies, Body, scan_counts, Where


class Solver:
    """The dims of every array of a program, united as its equations demand.

    Args:
        exact: also fix the dims that could shrink, but only by changing the function.

    Attributes:
        dims: for each place in the program, the dims of the variables there.
    """

    def __init__(self, exact: bool = True):
        self._exact = exact
        self.dims: dict[Where, dict[Var, Dims]] = {}

    def exact(self, d: Dim, reason: Callable[[], str]) -> Dim:
        """Fixes a dim that cannot shrink without changing the function."""
        return fix(d, reason, inexact=True) if self._exact else d

    def read(self, v: Any, where: Where) -> Dims:
        """The dims of a variable at a place, or of a literal."""
        if isinstance(v, Literal):
            return tuple(fix(Dim(n), lambda: "a constant") for n in v.aval.shape)
        return self.dims[where][v]

    def solve(
        self, jaxpr: ClosedJaxpr, ins: Sequence[Dims], where: Where = ()
    ) -> list[Dims]:
        """Goes through a program, from the dims of its inputs to its outputs'."""
        env = self.dims[where] = {}
        for v in jaxpr.jaxpr.constvars:
            env[v] = tuple(
                fix(Dim(n), lambda: "a constant array") for n in v.aval.shape
            )
        env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            given = [self.read(v, where) for v in eqn.invars]
            inner = bodies(eqn, (*where, i))
            if inner:
                with inside(eqn):
                    outs = _ENTER[inner[0].kind](self, eqn, given, inner)
            else:
                outs = rule_of(eqn)(self, eqn, given)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [self.read(v, where) for v in jaxpr.jaxpr.outvars]

    def _call(self, eqn: JaxprEqn, ins: list[Dims], inner: list[Body]) -> list[Dims]:
        return self.solve(inner[0].jaxpr, ins, inner[0].where)

    def _scan(self, eqn: JaxprEqn, ins: list[Dims], inner: list[Body]) -> list[Dims]:
        n, m = scan_counts(eqn)
        entering = []
        for j, dims in enumerate(ins):
            if j in inner[0].stacked:
                fix(dims[0], because(eqn, "a scan runs over it"))
                dims = dims[1:]
            entering.append(dims)
        outs = self.solve(inner[0].jaxpr, entering, inner[0].where)
        carry = self._same(eqn, [ins[n : n + m], outs[:m]])
        lengths = [
            fixed(eqn, "a scan runs over it", i)[:1] for i in range(m, len(eqn.outvars))
        ]
        return [*carry, *((*a, *b) for a, b in zip(lengths, outs[m:], strict=True))]

    def _while(self, eqn: JaxprEqn, ins: list[Dims], inner: list[Body]) -> list[Dims]:
        test, body = inner
        self.solve(test.jaxpr, [ins[j] for j in test.operands], test.where)
        outs = self.solve(body.jaxpr, [ins[j] for j in body.operands], body.where)
        return self._same(eqn, [ins[len(ins) - len(outs) :], outs])

    def _cond(self, eqn: JaxprEqn, ins: list[Dims], inner: list[Body]) -> list[Dims]:
        outs = [
            self.solve(body.jaxpr, [ins[j] for j in body.operands], body.where)
            for body in inner
        ]
        return self._same(eqn, outs)

    def _shard_map(
        self, eqn: JaxprEqn, ins: list[Dims], inner: list[Body]
    ) -> list[Dims]:
        return rule_of(eqn)(self, eqn, ins)

    def _same(self, eqn: JaxprEqn, several: Sequence[Sequence[Dims]]) -> list[Dims]:
        """Lists of arrays that are the same arrays at different times."""
        return [
            tuple(unite_all(eqn, dims) for dims in zip(*arrays, strict=True))
            for arrays in zip(*several, strict=True)
        ]


_ENTER = {
    "call": Solver._call,
    "scan": Solver._scan,
    "while": Solver._while,
    "cond": Solver._cond,
    "shard_map": Solver._shard_map,
}
