"""A function as a chain of pieces that hand one another few arrays.

The program is laid out as one line of steps, with stacked layers of a scan one by one.
What crosses from a step to the next was computed from weights and data before it and is
used after it. A weight stays with the piece that uses it. What is made of weights alone
(as a cast), or of the data without any weight or product (as a mask, or random keys),
does not cross: it is made again wherever it is used.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .call import Call
from .flops import equation_flops, MATMULS
from .lift import unlift
from .scanned import find_scanned
from .source import source_line
from .straight import run_step, Step, Straight
from .walk import bodies, equations


class WeightPart(NamedTuple):
    """A weight, or one slice along dim 0 of one that is stacked."""

    path: str
    turn: int | None = None


class Crossing(NamedTuple):
    """A place between two steps where a function can be cut.

    Attributes:
        at: how many steps are before it.
        flops: of the step before it.
        arrays: how many cross.
        bytes: of those.
        source: line of code of the last step before it.
    """

    at: int
    flops: int
    arrays: int
    bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some steps that follow one another.

    Attributes:
        weights: what it uses, and no other piece does.
        takes: shape and dtype of what the piece before hands on; nothing for the first.
        gives: of what it hands on; nothing for the last.
        makes: which of the function's outputs it computes, for `Chain.result`.
        flops: of its steps; a multiply-add is 2.
    """

    weights: tuple[WeightPart, ...]
    takes: tuple[jax.ShapeDtypeStruct, ...]
    gives: tuple[jax.ShapeDtypeStruct, ...]
    makes: tuple[int, ...]
    flops: int
    _run: Callable

    def __call__(
        self,
        own: Mapping[WeightPart, Any],
        shared: Mapping[str, Any],
        data: Sequence[Any],
        taken: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """What it hands on, and the outputs that it makes.

        Args:
            own: its `weights`.
            shared: all weights that are of no single piece, by path.
            data: what the function takes beside weights, flat.
            taken: what the piece before handed on.
        """
        return self._run(own, shared, data, taken)


class Chain:
    """A traced function that can be cut into pieces.

    Attributes:
        call: the function as it was traced.
        crossings: where it can be cut; the last of them is its end.
    """

    def __init__(self, fn: Callable, params: Any, args: Sequence, kwargs: dict):
        """Traces `fn(params, *args, **kwargs)`; arrays may be given as shapes."""
        self.call = Call(unlift(fn), params, args, kwargs)
        _, layers = find_scanned(self.call.jaxpr, self.call.weights)
        self._line = Straight(self.call.jaxpr, lambda where: where in layers)
        self._made = {n: i for i, s in enumerate(self._line.steps) for n in s.outs}
        numbers = zip(self._line.inputs, self.call.weights, strict=True)
        self._paths = {n: path for n, path in numbers if path is not None}
        self._data = [n for n in self._line.inputs if n not in self._paths]
        self._crosses = self._find_crosses()
        # What the layers of a scan put out is stacked at the end, and crosses nowhere.
        used = {n for s in self._line.steps for n in s.ins}
        self._rows = [self._rows_of(n, used) for n in self._line.outputs]
        self._outputs = [n for rows in self._rows for n in rows]
        self._order = self._needed()

    @functools.cached_property
    def crossings(self) -> list[Crossing]:
        """Where the function can be cut; the last is its end."""
        last: dict[int, int] = {}
        for at, i in enumerate(self._order):
            for n in self._ins(i):
                if n in self._crosses:
                    last[n] = at
        open_: dict[int, int] = {}
        found = []
        for at, i in enumerate(self._order):
            step = self._line.steps[i]
            open_.update({n: last[n] for n in step.outs if n in last})
            open_ = {n: end for n, end in open_.items() if end > at}
            moved = sum(_bytes(self._shape(n)) for n in open_)
            source = "" if step.eqn is None else source_line(step.eqn)
            found.append(Crossing(at + 1, _flops(step), len(open_), moved, source))
        return found

    @property
    def steps(self) -> int:
        """How many steps there are that can be cut between."""
        return len(self._order)

    def cut(self, places: Sequence[int]) -> tuple[list[Piece], list[str]]:
        """The pieces between some places, and the weights that are of no single one.

        Args:
            places: `Crossing.at` of where to cut, without the end.
        """
        bounds = [0, *places, len(self._order)]
        within = [self._order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        outputs: list[dict[int, int]] = [{} for _ in within]  # of each: which is what
        home = {
            n: k for k, run in enumerate(within) for i in run for n in self._outs(i)
        }
        for j, n in enumerate(self._outputs):
            outputs[home.get(n, 0)][j] = n
        needs = [
            self._closure(run, made.values())
            for run, made in zip(within, outputs, strict=True)
        ]
        shared = self._shared([list(parts.values()) for _, parts in needs])
        pieces: list[Piece] = []
        taken: tuple[int, ...] = ()
        for k, (run, (steps, parts)) in enumerate(zip(within, needs, strict=True)):
            later = [i for after in within[k + 1 :] for i in after]
            used = dict.fromkeys(n for i in later for n in self._ins(i))
            given = tuple(n for n in used if home.get(n, k + 1) <= k)
            own = {n: p for n, p in parts.items() if p.path not in shared}
            body = [self._line.steps[i] for i in steps if self._outs(i)[0] not in own]
            made = outputs[k]
            pieces.append(
                Piece(
                    tuple(own.values()),
                    tuple(map(self._shape, taken)),
                    tuple(map(self._shape, given)),
                    tuple(made),
                    sum(_flops(self._line.steps[i]) for i in run),
                    functools.partial(
                        self._run, body, own, taken, given, tuple(made.values())
                    ),
                )
            )
            taken = given
        return pieces, sorted(shared)

    def result(self, outs: Mapping[int, Any]) -> Any:
        """What the function returns, of what all pieces made."""
        values = iter([outs[j] for j in range(len(self._outputs))])
        whole = []
        for n, rows in zip(self._line.outputs, self._rows, strict=True):
            given = [next(values) for _ in rows]
            whole.append(given[0] if rows == [n] else jnp.stack(given))
        return self.call.unflatten(whole)

    def _rows_of(self, number: int, used: set[int | None]) -> list[int]:
        """The values that an output is stacked of, or itself alone."""
        i = self._made.get(number)
        if i is None or number in used or self._line.steps[i].kind != "stack":
            return [number]
        return self._ins(i)

    def _ins(self, i: int) -> list[int]:
        return [n for n in self._line.steps[i].ins if n is not None]

    def _outs(self, i: int) -> tuple[int, ...]:
        return self._line.steps[i].outs

    def _run(
        self,
        body: Sequence[Step],
        parts: Mapping[int, WeightPart],
        takes: Sequence[int],
        gives: Sequence[int],
        makes: Sequence[int],
        own: Mapping[WeightPart, Any],
        shared: Mapping[str, Any],
        data: Sequence[Any],
        taken: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        values = dict(self._line.constants)
        values.update(zip(self._data, data, strict=True))
        values.update((n, shared[p]) for n, p in self._paths.items() if p in shared)
        values.update((n, own[part]) for n, part in parts.items())
        values.update(zip(takes, taken, strict=True))
        for step in body:
            args = [None if n is None else values[n] for n in step.ins]
            values.update(zip(step.outs, run_step(step, args), strict=True))
        return [values[n] for n in gives], [values[n] for n in makes]

    def _find_crosses(self) -> set[int]:
        """The values that are made of weights and data, or of data by a product."""
        from_weights, from_data = set(self._paths), set(self._data)
        crosses: set[int] = set()
        for step in self._line.steps:
            met = {n for n in step.ins if n is not None}
            crossing = bool(met & crosses)
            weights, data = bool(met & from_weights), bool(met & from_data)
            if crossing or (data and (weights or _multiplies(step))):
                crosses.update(step.outs)
            elif weights:
                from_weights.update(step.outs)
            elif data:
                from_data.update(step.outs)
        return crosses

    def _needed(self) -> list[int]:
        """The steps that make what crosses, as far as an output depends on them."""
        live, order = set(self._outputs), []
        for i in reversed(range(len(self._line.steps))):
            step = self._line.steps[i]
            if live.isdisjoint(step.outs):
                continue
            live.update(self._ins(i))
            if not self._crosses.isdisjoint(step.outs):
                order.append(i)
        return order[::-1]

    def _closure(
        self, run: Sequence[int], outputs: Iterable[int]
    ) -> tuple[list[int], dict[int, WeightPart]]:
        """All steps of a piece, with those that are made again, and its weights."""
        steps, parts = set(run), {}
        todo = [n for i in run for n in self._ins(i)] + list(outputs)
        while todo:
            n = todo.pop()
            if n in self._crosses:
                continue
            if n in self._paths:
                parts[n] = WeightPart(self._paths[n])
                continue
            i = self._made.get(n)
            if i is None or i in steps:
                continue
            steps.add(i)
            step = self._line.steps[i]
            if step.kind == "take" and step.ins[0] in self._paths:
                parts[n] = WeightPart(self._paths[step.ins[0]], step.turn)
            else:
                todo += self._ins(i)
        return sorted(steps), parts

    def _shared(self, pieces: Sequence[Sequence[WeightPart]]) -> set[str]:
        """The weights that can't be given to one piece, nor slice by slice to some."""
        users: dict[str, dict[int | None, set[int]]] = {
            path: {} for path in self._paths.values()
        }
        for k, parts in enumerate(pieces):
            for path, turn in parts:
                users[path].setdefault(turn, set()).add(k)
        weights = dict(zip(self.call.weights, self.call.inputs, strict=True))

        def parted(path: str, turns: Mapping[int | None, set[int]]) -> bool:
            every = 1 if None in turns else (weights[path].shape or (0,))[0]
            return len(turns) == every and all(len(by) == 1 for by in turns.values())

        return {path for path, turns in users.items() if not parted(path, turns)}

    def _shape(self, number: int) -> jax.ShapeDtypeStruct:
        step = self._line.steps[self._made[number]]
        if step.eqn is not None:
            aval = step.eqn.outvars[step.outs.index(number)].aval
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        assert step.ins[0] is not None
        of = self._inner(step.ins[0])
        shape = of.shape[1:] if step.kind == "take" else (len(step.ins), *of.shape)
        return jax.ShapeDtypeStruct(shape, of.dtype)

    def _inner(self, number: int) -> Any:
        if number in self._made:
            return self._shape(number)
        if number in self._line.constants:
            return self._line.constants[number]
        at = self._line.inputs.index(number)
        return self.call.jaxpr.in_avals[at]


def _inside(step: Step) -> list[tuple[Any, int]]:
    """The equations that a step runs, and how often."""
    if step.eqn is None:
        return []
    held = bodies(step.eqn)
    if not held:
        return [(step.eqn, 1)]
    return [
        (eqn, 1 if times is None else times)
        for body in held
        for where, eqn, times in equations(body.jaxpr, times=body.times)
        if not bodies(eqn, where)
    ]


def _flops(step: Step) -> int:
    return sum(equation_flops(eqn) * times for eqn, times in _inside(step))


def _multiplies(step: Step) -> bool:
    return any(eqn.primitive.name in MATMULS for eqn, _ in _inside(step))


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize
