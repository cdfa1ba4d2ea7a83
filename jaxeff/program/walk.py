"""What programs hold programs, and how to walk through all of their equations.

An equation's place in a program is its *where*: the indices that lead to it,
`(3, 0, 7)`. One body called twice has two wheres, so nothing is ever kept per
variable of a shared body.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

Where = tuple[int | str, ...]


class Body(NamedTuple):
    """A program held by an equation, and what of the equation flows into it."""

    jaxpr: ClosedJaxpr
    kind: str  # "call", "scan", "while", "cond" or "shard_map"
    where: Where
    operands: Sequence[int]  # for each input, which operand of the equation it is
    times: int | None  # how often it runs; None: unknown (while)
    stacked: tuple[int, ...] = ()  # inputs that arrive sliced along dim 0


def closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    """The program with its constants; some primitives hold it bare."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "ft_in" in eqn.params:  # from JAX 0.11
        groups = eqn.params["ft_in"].update(list(eqn.invars)).unpack()
        consts, carry, _ = (list(g.vals) for g in groups)
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def bodies(eqn: JaxprEqn, where: Where = ()) -> list[Body]:
    """The programs an equation holds that run when it does; none for most."""
    name, params, every = eqn.primitive.name, eqn.params, range(len(eqn.invars))
    if name in CALLS:
        jaxpr = closed(params[CALLS[name]])
        return [Body(jaxpr, "call", (*where, 0), every, 1)]
    if name == "scan":
        consts, carry = scan_counts(eqn)
        stacked = tuple(every[consts + carry :])
        jaxpr = closed(params["jaxpr"])
        return [Body(jaxpr, "scan", (*where, 0), every, params["length"], stacked)]
    if name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carry = every[n + m :]
        test, body = closed(params["cond_jaxpr"]), closed(params["body_jaxpr"])
        return [
            Body(test, "while", (*where, 0), [*every[:n], *carry], None),
            Body(body, "while", (*where, 1), [*every[n : n + m], *carry], None),
        ]
    if name == "cond":
        return [
            Body(closed(branch), "cond", (*where, i), every[1:], 1)
            for i, branch in enumerate(params["branches"])
        ]
    if name == "shard_map":
        return [Body(closed(params["jaxpr"]), "shard_map", (*where, 0), every, 1)]
    return []


def equations(
    jaxpr: ClosedJaxpr,
    where: Where = (),
    times: int | None = 1,
    used: Sequence[bool] | None = None,
) -> Iterator[tuple[Where, JaxprEqn, int | None]]:
    """Every equation that matters, bodies entered, with its place and its runs.

    `None` runs stands for an unknown number: somewhere inside a `while`. What no
    output depends on is left out, as the compiler does. `used` says which
    outputs are needed; by default all.
    """
    for i, outs in needed(jaxpr, used)[0]:
        eqn, here = jaxpr.jaxpr.eqns[i], (*where, i)
        yield here, eqn, times
        for body in bodies(eqn, here):
            inner = product(times, body.times)
            yield from equations(body.jaxpr, body.where, inner, _asked(body, outs))


def product(a: int | None, b: int | None) -> int | None:
    """How often something runs inside something that runs; None is unknown."""
    return None if a is None or b is None else a * b


def _asked(body: Body, outs: list[bool]) -> list[bool] | None:
    """Which outputs of a body are needed, given which of its equation are."""
    return outs if body.kind in ("call", "cond") else None


def needed(
    jaxpr: ClosedJaxpr, used: Sequence[bool] | None = None
) -> tuple[list[tuple[int, list[bool]]], list[bool]]:
    """The equations that outputs depend on, and which inputs those depend on.

    With each equation, by its index, comes which of its own outputs are needed.
    """
    used = [True] * len(jaxpr.jaxpr.outvars) if used is None else used
    live = {v for v, u in zip(jaxpr.jaxpr.outvars, used, strict=True) if u}
    live = {v for v in live if isinstance(v, Var)}
    found: list[tuple[int, list[bool]]] = []
    for i in reversed(range(len(jaxpr.jaxpr.eqns))):
        eqn = jaxpr.jaxpr.eqns[i]
        outs = [v in live for v in eqn.outvars]
        if not any(outs) and not eqn.effects:
            continue
        found.append((i, outs))
        read = eqn.invars
        inner = bodies(eqn)
        if inner and inner[0].kind == "call":
            ins = needed(inner[0].jaxpr, outs)[1]
            read = [v for v, needed in zip(read, ins, strict=True) if needed]
        live.update(v for v in read if isinstance(v, Var))
    return found[::-1], [v in live for v in jaxpr.jaxpr.invars]
