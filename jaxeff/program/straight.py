"""A program as one straight line of steps, so that it can stop anywhere.

Plain calls are inlined, others too where somebody wants to stop inside, and scans
unrolled there; every other equation stays whole. A run can then pause before any
step, look at what has been computed so far, change a weight, and go on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from .lift import Lifting
from .walk import bodies, scan_counts, Where

# Calls without a rule of their own: opened always, as a weight may be cut in one.
_PLAIN_CALLS = ("jit", "closed_call", "remat2", "checkpoint")


class Step(NamedTuple):
    """One equation, or what unrolling a scan puts in its place.

    Values have numbers; `None` among the operands is a literal of the equation.
    """

    kind: str  # "equation", "take" (a slice along dim 0) or "stack"
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    where: Where
    eqn: JaxprEqn | None = None
    turn: int = 0  # of a "take": which slice


class Straight:
    """A program whose steps run one after another.

    Attributes:
        steps: in the order they run.
        inputs: number of each input of the program.
        outputs: number of each output.
        constants: values that are neither inputs nor computed, by number.
    """

    def __init__(self, jaxpr: ClosedJaxpr, opened: Callable[[Where], bool]):
        """Straightens a program.

        Args:
            jaxpr: the program.
            opened: whether to stop inside the equation at that place. What has no
                straight form (`while`, `cond`, `shard_map`) stays whole anyway.
        """
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self._count = 0
        self._opened = opened
        self.inputs = self._new(len(jaxpr.jaxpr.invars))
        self.outputs = self._run(jaxpr, self.inputs, ())

    def _new(self, n: int) -> list[int]:
        self._count += n
        return list(range(self._count - n, self._count))

    def _constant(self, value: Any) -> int:
        (number,) = self._new(1)
        self.constants[number] = value
        return number

    def _run(
        self, jaxpr: ClosedJaxpr, inputs: Sequence[int], where: Where
    ) -> list[int]:
        env = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))
        for v, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            env[v] = self._constant(value)
        literal = lambda v: isinstance(v, Literal)
        read = lambda v: self._constant(v.val) if literal(v) else env[v]
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            here = (*where, i)
            held = bodies(eqn, here)
            kind = held[0].kind if held else ""
            opens = eqn.primitive.name in _PLAIN_CALLS or self._opened(here)
            if kind in ("call", "scan") and opens:
                given = [read(v) for v in eqn.invars]
                if kind == "call":
                    outs = self._run(held[0].jaxpr, given, held[0].where)
                else:
                    outs = self._unroll(eqn, held[0].jaxpr, given, held[0].where)
            else:
                ins = tuple(None if literal(v) else env[v] for v in eqn.invars)
                outs = self._new(len(eqn.outvars))
                self.steps.append(Step("equation", ins, tuple(outs), here, eqn))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def _unroll(
        self, eqn: JaxprEqn, body: ClosedJaxpr, given: list[int], where: Where
    ) -> list[int]:
        n, m = scan_counts(eqn)
        consts, carry, xs = given[:n], given[n : n + m], given[n + m :]
        turns = range(eqn.params["length"])
        stacked: dict[int, list[int]] = {}
        for turn in reversed(turns) if eqn.params["reverse"] else turns:
            slices = []
            for x in xs:
                slices += self._new(1)
                self.steps.append(Step("take", (x,), (slices[-1],), where, None, turn))
            outs = self._run(body, [*consts, *carry, *slices], where)
            carry, stacked[turn] = outs[:m], outs[m:]
        ys = []
        for rows in zip(*(stacked[turn] for turn in turns), strict=True):
            ys += self._new(1)
            self.steps.append(Step("stack", rows, (ys[-1],), where))
        return [*carry, *ys]

    def fixed(self, data: Sequence[int]) -> set[int]:
        """The values that do not depend on `data`: weights, what is made of them."""
        moving = set(data)
        for step in self.steps:
            if any(i in moving for i in step.ins):
                moving.update(step.outs)
        every = {out for step in self.steps for out in step.outs}
        return (every | set(self.inputs) | set(self.constants)) - moving


def run_step(step: Step, args: Sequence[Any], turn: Any = None) -> list[Any]:
    """The results of one step; weights among its operands may be compressed.

    Args:
        step: of a straight program.
        args: a value for each operand; for a literal anything.
        turn: in place of the step's own; may be traced.
    """
    rule = Lifting()
    if step.kind == "take":
        turn = step.turn if turn is None else turn
        take = lambda x: jax.lax.dynamic_index_in_dim(x, turn, keepdims=False)
        return [jax.tree.map(take, args[0])]  # of a leaf: every array of it
    if step.kind == "stack":
        return [jnp.stack([rule.plain(x) for x in args])]
    assert step.eqn is not None
    pairs = zip(step.eqn.invars, args, strict=True)
    args = [v.val if isinstance(v, Literal) else x for v, x in pairs]
    return list(rule.step(step.eqn, args, step.where))


class Segments:
    """Runs pieces of a straight program; equal pieces are compiled once.

    The turns of an unrolled scan are equal pieces.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable] = {}

    def __call__(
        self, steps: Sequence[Step], values: dict[int, Any], outs: Sequence[int]
    ) -> list[Any]:
        """The values numbered `outs`, of `steps` run on `values`."""
        local: dict[int, int] = {n: i for i, n in enumerate(values)}
        number = lambda n: local.setdefault(n, len(local))
        small = []
        for step in steps:
            ins = tuple(None if n is None else number(n) for n in step.ins)
            made = tuple(map(number, step.outs))
            small.append(step._replace(ins=ins, outs=made, turn=0))
        wanted = [local[n] for n in outs]
        # Equations are equal where they are the same object, which `small` keeps alive.
        key = (
            tuple((s.kind, s.ins, s.outs, id(s.eqn)) for s in small),
            tuple(wanted),
            len(values),
        )
        if key not in self._compiled:
            self._compiled[key] = jax.jit(_runner(small, wanted))
        turns = [step.turn for step in steps if step.kind == "take"]
        return self._compiled[key](list(values.values()), jnp.asarray(turns, jnp.int32))


def _runner(steps: list[Step], outs: list[int]) -> Callable:
    def run(values: list[Any], turns: jax.Array) -> list[Any]:
        env, taken = dict(enumerate(values)), 0
        for step in steps:
            args = [None if i is None else env[i] for i in step.ins]
            turn = turns[taken] if step.kind == "take" else None
            taken += step.kind == "take"
            env.update(zip(step.outs, run_step(step, args, turn), strict=True))
        rule = Lifting()
        return [rule.plain(env[i]) for i in outs]

    return run
