"""Whether what a program puts out still depends on its data.

Where a coupling has lost all its indices, the arrays that carried it are empty, and
what is summed over them is zero whatever the data are. A residual stream goes on
beside that; a plain chain of layers is cut.
"""

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .walk import bodies, Body, scan_counts


def data_reaches(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> list[bool]:
    """For each output of a program whether it depends on data.

    Args:
        jaxpr: the program.
        data: for each input whether it is data.
    """
    carries: dict[Var, bool] = dict.fromkeys(jaxpr.jaxpr.constvars, False)
    carries.update(zip(jaxpr.jaxpr.invars, data, strict=True))
    read = lambda v: not isinstance(v, Literal) and carries[v] and v.aval.size > 0
    for eqn in jaxpr.jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        inner = bodies(eqn)
        outs = _inside(eqn, given, inner) if inner else [any(given)] * len(eqn.outvars)
        carries.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _inside(eqn: JaxprEqn, given: list[bool], inner: list[Body]) -> list[bool]:
    kind = inner[0].kind
    if kind == "scan":
        return _turns(inner[0], given, *scan_counts(eqn))
    if kind == "while":
        m = len(eqn.outvars)
        body = inner[-1]
        entering = [given[j] for j in body.operands]
        return _turns(body, entering, len(entering) - m, m)
    several = [data_reaches(b.jaxpr, [given[j] for j in b.operands]) for b in inner]
    return [any(outs) for outs in zip(*several, strict=True)]


def _turns(body: Body, given: list[bool], consts: int, carried: int) -> list[bool]:
    """The outputs of a loop: what is carried may meet data in a later turn."""
    carry = given[consts : consts + carried]
    while True:
        ins = [*given[:consts], *carry, *given[consts + carried :]]
        outs = data_reaches(body.jaxpr, ins)
        after = [a or b for a, b in zip(carry, outs[:carried], strict=True)]
        if after == carry:
            return [*carry, *outs[carried:]]
        carry = after
