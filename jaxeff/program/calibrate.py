"""Changes weights one after another, each by what flows into it.

`calibrate` runs a function on several batches at once and pauses before each
product or convolution with a chosen weight: it sums a statistic of what flows in
there, changes the weight, and goes on with the changed one. So each weight is
fitted to inputs that the weights changed before it computed, as layer-by-layer
methods want it, though nothing here knows of layers: the order is the program's,
and a scan over stacked layers is taken turn by turn.

It holds the model, the activations of all batches that are still to be read, and
the statistic of one input (of several only while a weight that is used again waits
for its last use). It runs each operation once for each batch.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from rich.console import Console
from rich.progress import Progress

from jaxeff import tree

from .given import check_batches, check_values
from .leaf import is_leaf
from .matrices import data_key, data_matrix
from .memory import Memory
from .straight import Segments, Step
from .uses import find_uses, Part, Use, Uses

Update = Callable[[Part, Float[Array, "groups rows cols"], Any], Any]
Restore = Callable[[Part, dict[str, np.ndarray]], None]

_WEIGHT = "weight"  # among what is remembered of a part


def squares(x: Float[Array, "groups n cols"]) -> Float[Array, "groups cols"]:
    """A statistic for `calibrate`: the squared Euclidean norm of each column."""
    return jnp.sum(x * x, axis=1)


def gram(x: Float[Array, "groups n cols"]) -> Float[Array, "groups cols cols"]:
    """A statistic for `calibrate`: x^T x, half the Hessian of the squared error.

    The error of y = x w^T under a change d of w is the sum of d (x^T x) d^T.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("gni,gnj->gij", x, x, precision=highest)


def calibrate(
    fn: Callable,
    params: PyTree,
    batches: Iterable[tuple],
    *,
    weights: Sequence[str],
    statistic: Callable[..., PyTree],
    update: Update,
    combine: Callable[[Array, Array], Array] = jnp.add,
    compare: PyTree = None,
    memory: Memory | None = None,
    restore: Restore | None = None,
    progress: bool = True,
) -> PyTree:
    """The parameters, with each chosen weight replaced by what `update` makes of it.

    A weight is seen as matrices (groups, rows, columns), see `matrices`: a row for
    each output, a column for each input. A weight stacked for a scan is changed
    turn by turn, one that is cut in parts (a fused q, k, v) part by part. One that
    is used several times is changed at its last use, by the sum of the statistics
    of all; until then it runs as it was.

    Args:
        fn: `fn(params, *batch)`.
        params: its weights.
        batches: tuples of arguments, all of the same shapes.
        weights: the paths of those to change.
        statistic: maps the inputs of a weight, float32 of shape (groups, n, columns),
            to a tree of arrays.
        combine: makes one of the statistics of two batches or two uses.
        compare: weights of another model of that kind: `statistic` is given, as a
            second argument, the inputs that the weight has there. It takes the time
            and the memory of a second run. None: it is not.
        update: maps a part of a weight, the weight there in float32, and all of its
            statistics combined to the new weight, of the same shape; or to that and a
            dict of arrays for `restore`. With a weight cut in parts it is called once
            for each.
        memory: where parts that are done are remembered; those that are there are
            not done again, and no statistic is taken of them.
        restore: is told of each such part, and what `update` gave beside its weight.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: there is no batch, one is no tuple, two differ in shape, a weight
            has no values or cannot be calibrated (`find_uses` says why), or a
            statistic is not finite.
    """
    given = _alike(check_batches(batches))
    check_values(params, "calibration")
    uses = _calibrated(fn, params, given[0], weights)
    arrays = lambda: [_arrays(batch) for batch in given]
    other = None
    if compare is not None:
        theirs = _calibrated(fn, compare, given[0], weights)
        other = _Run(theirs, arrays(), statistic, combine)
    run = _Run(uses, arrays(), statistic, combine, other)

    def remembered(part, w, total):
        new = update(part, w, total)
        new, beside = new if isinstance(new, tuple) else (new, {})
        if memory is not None:
            memory.put(part, {**beside, _WEIGHT: new})
        return new

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=len(uses.uses))
        for use in uses.uses:
            bar.update(task, description=use.part.path)
            done = None if memory is None else memory.get(use.part)
            if done is None:
                run.visit(use, remembered)
            elif use.last:
                new = done.pop(_WEIGHT)
                run.visit_done(use, jnp.asarray(new))
                if restore is not None:
                    restore(run.part(use), done)
            bar.advance(task)
    new = {path: run.weight(path) for path in uses.candidates}
    return tree.replaced(params, new, is_leaf)


def change_parts(
    fn: Callable,
    params: PyTree,
    *args: Any,
    weights: Sequence[str],
    update: Callable[[Part, Float[Array, "groups rows cols"]], Any],
) -> PyTree:
    """`calibrate` without data: `update(part, w)` makes the new weight of the old.

    Args:
        fn: `fn(params, *args)`.
        params: its weights.
        args: example inputs, or their shapes.
        weights: the paths of those to change.
        update: as for `calibrate`, without statistics.

    Raises:
        ValueError: a weight has no values, or no such form; `find_uses` says why.
    """
    check_values(params, "a change of weights")
    uses = _calibrated(fn, params, args, weights)
    values = dict(uses.weights)
    for use in uses.uses:
        if use.last:
            number = uses.candidates[use.part.path].number
            elements = uses.elements(use)
            part = dataclasses.replace(use.part, elements=elements)
            change = lambda w, part=part: update(part, w)
            values[number] = _changed(values[number], elements, change)
    found = {path: values[c.number] for path, c in uses.candidates.items()}
    return tree.replaced(params, found, is_leaf)


def _calibrated(
    fn: Callable, params: PyTree, args: tuple, weights: Sequence[str]
) -> Uses:
    uses = find_uses(fn, params, args, weights)
    for path, candidate in uses.candidates.items():
        if candidate.reason:
            raise ValueError(
                f"{path} cannot be calibrated: {candidate.reason}. Leave it out."
            )
    return uses


def _alike(given: list[tuple]) -> list[tuple]:
    for i, batch in enumerate(given):
        if _kinds(batch) != _kinds(given[0]):
            raise ValueError(
                f"all batches have the same shapes, but batch {i} has "
                f"{_kinds(batch)[1]} where the first has {_kinds(given[0])[1]}. Leave "
                "out a last, smaller one."
            )
    return given


def _dynamic(x: Any) -> bool:
    return is_leaf(x) or tree.is_array(x)


def _kinds(batch: tuple) -> tuple[Any, list]:
    values, treedef = jax.tree.flatten(batch, is_leaf=is_leaf)
    kind = lambda x: (tuple(x.shape), str(x.dtype)) if _dynamic(x) else x
    return treedef, [kind(x) for x in values]


def _arrays(batch: tuple) -> list[Any]:
    return [x for x in jax.tree.leaves(batch, is_leaf=is_leaf) if _dynamic(x)]


class _Run:
    """All batches, somewhere in the program."""

    def __init__(
        self,
        uses: Uses,
        batches: list[list],
        statistic: Callable[..., PyTree],
        combine: Callable[[Array, Array], Array],
        other: "_Run | None" = None,
    ):
        self.uses, self.program = uses, uses.program
        self.other = other  # the model to compare with
        # What does not depend on data is made anew from these wherever it is read,
        # so that it is always that of the weights as they are now.
        self.values = {**uses.program.constants, **uses.weights}
        self.batches = [dict(zip(uses.data, xs, strict=True)) for xs in batches]
        self.fixed = uses.fixed
        self.last = self._last_reads()
        self.at = 0  # the next step
        self.segments = Segments()
        self.statistic, self.combine = statistic, combine
        self.latest: tuple[Any, PyTree] | None = None
        self.waiting: dict[Part, PyTree] = {}
        self.adders: dict[Any, Callable] = {}

    def _last_reads(self) -> dict[int, int]:
        """For each value that a use depends on, the last step that reads it."""
        last = {use.data: use.step for use in self.uses.uses}
        for use in self.uses.uses:  # the last of several counts
            last[use.data] = max(last[use.data], use.step)
        for i in reversed(range(len(self.program.steps))):
            step = self.program.steps[i]
            if any(n in last for n in step.outs):
                for n in step.ins:
                    if n is not None:
                        last[n] = max(last.get(n, i), i)
        return last

    def weight(self, path: str) -> Array:
        return self.values[self.uses.candidates[path].number]

    def visit(self, use: Use, update: Update) -> None:
        """Goes on to that use, and changes the weight if it is its last."""
        self._advance(use.step)
        total = self._collect(use)
        if use.part in self.waiting:
            total = jax.tree.map(self.combine, self.waiting.pop(use.part), total)
        if not use.last:
            self.waiting[use.part] = total
            return
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(total)):
            raise ValueError(
                f"what flows into {use.part.path} at {use.source} is not finite, or "
                "too large to be summed in float32: check the batches and the model."
            )
        part = self.part(use)
        self._change(use, part, lambda w: update(part, w, total))

    def visit_done(self, use: Use, new: Array) -> None:
        """Goes on to that use, and puts the weight that is known already."""
        self._advance(use.step)
        self._change(use, self.part(use), lambda w: new)

    def part(self, use: Use) -> Part:
        """What a use sees of a weight, with its elements."""
        return dataclasses.replace(use.part, elements=self.uses.elements(use))

    def _change(self, use: Use, part: Part, change: Callable) -> None:
        assert part.elements is not None
        number = self.uses.candidates[use.part.path].number
        self.values[number] = _changed(self.values[number], part.elements, change)

    def _collect(self, use: Use) -> PyTree:
        """The statistic of what flows in there, summed over the batches."""
        eqn, columns = use.eqn, self.uses.alignment(use)
        key = (use.data, data_key(eqn, use.operand))
        if columns is None and self.latest is not None and self.latest[0] == key:
            return self.latest[1]  # q, k and v see the same
        self.latest = None  # before there is another one

        def add(total, xs, columns):
            xs = [data_matrix(eqn, use.operand, x) for x in xs]
            if columns is not None:
                group, at = columns[0], columns[1][:, None]
                xs = [jnp.take_along_axis(x[group], at, axis=2) for x in xs]
            new = self.statistic(*xs)
            return new if total is None else jax.tree.map(self.combine, total, new)

        # The turns of a scan are the same equation.
        named = (id(eqn), use.operand, columns is None)
        add = self.adders.setdefault(named, jax.jit(add))
        total = None
        for i, batch in enumerate(self.batches):
            xs = [self._data(use, batch)]
            if self.other is not None:
                xs.append(self.other._data(use, self.other.batches[i]))
            total = add(total, xs, columns)
        if columns is None:
            self.latest = (key, total)
        return total

    def _data(self, use: Use, batch: dict[int, Any]) -> Any:
        if use.data not in self.fixed:
            return batch[use.data]
        if use.data in self.values:
            return self.values[use.data]
        steps = self._remade({use.data}, use.step)
        return self.segments(steps, self._read(steps, {}), [use.data])[0]

    def _read(self, steps: list[Step], batch: dict[int, Any]) -> dict[int, Any]:
        """What those steps read and do not make, in the order in which they do."""
        made = {n for s in steps for n in s.outs}
        read = dict.fromkeys(n for s in steps for n in s.ins if n is not None)
        pick = lambda n: batch[n] if n in batch else self.values[n]
        return {n: pick(n) for n in read if n not in made}

    def _advance(self, to: int) -> None:
        """Runs all batches up to a step."""
        if self.other is not None:
            self.other._advance(to)
        steps, start, self.at = self.program.steps, self.at, to
        here = [
            s for s in steps[start:to] if any(self._later(n, start) for n in s.outs)
        ]
        outs = [n for s in here for n in s.outs if self._later(n, to)]
        if outs:
            made = {n for s in here for n in s.outs}
            read = {n for s in here for n in s.ins if n is not None} - made
            before = self._remade(read & self.fixed, to)
            run = [*before, *here]
            for batch in self.batches:
                new = self.segments(run, self._read(run, batch), outs)
                batch.update(zip(outs, new, strict=True))
        for batch in self.batches:
            for n in [n for n in batch if self.last.get(n, -1) < to]:
                del batch[n]

    def _later(self, number: int, at: int) -> bool:
        """Whether it depends on data and is read at that step or later."""
        return number not in self.fixed and self.last.get(number, -1) >= at

    def _remade(self, wanted: set[int], to: int) -> list[Step]:
        """The steps that make those fixed values from weights."""
        wanted, found = set(wanted), []
        for step in reversed(self.program.steps[:to]):
            if any(n in wanted for n in step.outs):
                found.append(step)
                wanted.update(n for n in step.ins if n is not None)
        return found[::-1]


def _changed(
    w: Any, elements: Int[Array, "groups rows cols"], change: Callable
) -> Array:
    """A weight with those of its elements replaced that a part consists of."""
    w = jnp.asarray(w)
    old = w.reshape(-1)[elements].astype(jnp.float32)
    new = change(old)
    if new.shape != old.shape:
        raise ValueError(
            f"an update keeps the shape of what it is given, {old.shape}, got "
            f"{new.shape}: return the whole part."
        )
    flat = w.reshape(-1).at[elements].set(new.astype(w.dtype), unique_indices=True)
    return flat.reshape(w.shape)
