"""What the rules of all primitives are made with.

A rule gets the dims of the operands and returns those of the results, uniting
what must change together on the way. It fixes what cannot change size there
(`fix`), and what may not change if the result is to be exact (`exact`: a sort,
a random number, a position).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jax.extend.core import JaxprEqn

from .dims import Dim, fix, unite
from .source import callers, source_line

Dims = tuple[Dim, ...]


@runtime_checkable
class Mode(Protocol):
    """What a rule may ask for beyond the algebra of dims."""

    def exact(self, d: Dim, reason: Callable[[], str]) -> Dim:
        """Fixes a dim for exactness only: a program being resized ignores it."""
        ...


Rule = Callable[[Mode, JaxprEqn, Sequence[Dims]], list[Dims]]


def because(eqn: JaxprEqn, what: str) -> Callable[[], str]:
    """A reason, spelled out only when somebody reads it."""
    around = callers()
    return lambda: f"{what} at {source_line(eqn, around)}"


def fresh(eqn: JaxprEqn, out: int = 0) -> Dims:
    """New dims for a result: nothing is known of them."""
    return tuple(Dim(n) for n in eqn.outvars[out].aval.shape)


def fixed(eqn: JaxprEqn, what: str, out: int = 0) -> Dims:
    """New dims for a result that must all stay."""
    return tuple(fix(d, because(eqn, what)) for d in fresh(eqn, out))


def unite_all(eqn: JaxprEqn, dims: Sequence[Dim]) -> Dim:
    """One dim out of several that an equation aligns."""
    name = eqn.primitive.name
    return functools.reduce(
        lambda a, b: unite(a, b, because(eqn, f"`{name}` aligns different cuts")), dims
    )


def unknown(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """The rule of a primitive that has none: all it touches must stay."""
    what = f"`{eqn.primitive.name}` has no rule"
    for dims in ins:
        for d in dims:
            fix(d, because(eqn, what))
    return [fixed(eqn, what, i) for i in range(len(eqn.outvars))]
