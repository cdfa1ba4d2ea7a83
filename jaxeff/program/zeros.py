"""Where removing an index is exact, because its entries are known to be zero.

Removing indices from a coupling equals zeroing them in every weight, as long
as nobody looks at what an operation made of the zeros. Whoever multiplies with
a weight along the dim never does: its rows are gone as well. A sum along it
does, and so does the product of two activations; there the entries must be
known to be zero still. Weights are zero where they are removed; `relu`, `tanh`
and products keep a zero; `exp`, `cos`, `x - mean(x)` and an added constant lose
it. A dim that is summed where the zero was lost is fixed, with that reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .rule import because, Dims
from .solve import Solver
from .source import inside
from .walk import bodies, Body, scan_counts, Where
from .zero_rules import free_atoms, NOTHING, Zero, ZERO_RULES


class Zeros:
    """Carries the knowledge of zeros through a solved program."""

    def __init__(self, solver: Solver):
        self.solver = solver

    def weight(self, dims: Dims) -> Zero:
        """A weight is zero wherever it is removed."""
        return Zero(free_atoms(dims))

    def run(
        self, jaxpr: ClosedJaxpr, ins: Sequence[Zero], where: Where = ()
    ) -> list[Zero]:
        """From what is known of the inputs to what is known of the outputs."""
        env: dict[Var, Zero] = dict.fromkeys(jaxpr.jaxpr.constvars, NOTHING)
        env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))
        read = lambda v: _literal(v) if isinstance(v, Literal) else env[v]
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            given = [read(v) for v in eqn.invars]
            inner = bodies(eqn, (*where, i))
            if inner:
                with inside(eqn):
                    outs = _ENTER[inner[0].kind](self, eqn, given, inner)
            else:
                outs = self._equation(eqn, given, where)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, given: list[Zero], where: Where) -> list[Zero]:
        name = eqn.primitive.name
        if all(z.constant is not None for z in given) and given:
            folded = _fold(name, eqn, [z.constant for z in given])
            if folded is not None:
                return [Zero(constant=folded)]
        rule = ZERO_RULES.get(name)
        if rule is None:
            return [NOTHING] * len(eqn.outvars)
        ins = [self.solver.read(v, where) for v in eqn.invars]
        outs = [self.solver.read(v, where) for v in eqn.outvars]
        known = rule(self, eqn, given, ins, outs)
        # An atom that left the array is forgotten: it may come back by broadcast.
        return [
            Zero(z.atoms & free_atoms(dims), z.constant)
            for z, dims in zip(known, outs, strict=True)
        ]

    def lost(self, eqn: JaxprEqn, dims: Dims, zero: Zero, what: str) -> None:
        """Fixes the atoms of summed dims that are not known to be zero."""
        for atom in free_atoms(dims):
            if not zero.has(atom):
                self.solver.exact(atom, because(eqn, what))

    # Bodies.

    def _call(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        return self.run(inner[0].jaxpr, given, inner[0].where)

    def _scan(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        n, m = scan_counts(eqn)
        body = inner[0]

        def turn(carry):
            return self.run(
                body.jaxpr, [*given[:n], *carry, *given[n + m :]], body.where
            )

        carry, outs = _fixed_point(turn, given[n : n + m])
        return [*carry, *outs[m:]]

    def _while(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        test, body = inner
        n_test, m = len(test.operands), len(eqn.outvars)
        turn = lambda carry: self.run(
            body.jaxpr, [*(given[j] for j in body.operands[:-m]), *carry], body.where
        )
        carry, _ = _fixed_point(turn, given[len(given) - m :])
        consts = [given[j] for j in test.operands[: n_test - m]]
        self.run(test.jaxpr, [*consts, *carry], test.where)
        return carry

    def _cond(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        several = [
            self.run(b.jaxpr, [given[j] for j in b.operands], b.where) for b in inner
        ]
        return [_both(*zeros) for zeros in zip(*several, strict=True)]

    def _shard_map(
        self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]
    ) -> list[Zero]:
        return [NOTHING] * len(eqn.outvars)


_ENTER = {
    "call": Zeros._call,
    "scan": Zeros._scan,
    "while": Zeros._while,
    "cond": Zeros._cond,
    "shard_map": Zeros._shard_map,
}


def _fixed_point(turn: Callable, carry: list[Zero]) -> tuple[list[Zero], list[Zero]]:
    """A loop's carry as known in every turn: knowledge only shrinks, so it ends."""
    while True:
        outs = turn(carry)
        after = [_both(a, b) for a, b in zip(carry, outs[: len(carry)], strict=True)]
        if after == carry:
            return carry, outs
        carry = after


def _both(*zeros: Zero) -> Zero:
    """What is known of an array that is one of several."""
    same = all(z.constant == zeros[0].constant for z in zeros)
    known = [z for z in zeros if z.constant != 0]
    shared = frozenset.intersection(*(z.atoms for z in known)) if known else frozenset()
    return Zero(shared, zeros[0].constant if same else None)


def _literal(v: Literal) -> Zero:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    if v.aval.size != 1 or not any(jnp.issubdtype(v.aval.dtype, t) for t in real):
        return NOTHING
    return Zero(constant=float(np.asarray(v.val).reshape(())))


def _fold(name: str, eqn: JaxprEqn, values: list[Any]) -> float | None:
    """The value of an operation on constants, where it is needed."""
    if name in (
        "broadcast_in_dim",
        "convert_element_type",
        "reshape",
        "copy",
        "squeeze",
    ):
        return values[0]
    if name == "neg":
        return -values[0]
    return None
