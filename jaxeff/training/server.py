"""The weights of an asynchronous run, and who has seen which batch.

Each batch of a run has a number. A worker takes a number and the weights, computes the
gradient there, and gives it back; it is applied at once, whatever the others do. This
file knows nothing of processes: threads, or an engine such as Ray, call it.

Law: each batch from 0 to `steps - 1` is applied exactly once, whoever dies, comes late
or says the same thing twice; and no gradient is older than `staleness` updates.

Sources: Dean et al. 2012 (Downpour SGD); Ho et al. 2013 (bounded staleness); Zheng et
al. 2017, arXiv:1609.08326 (delay compensation).
"""

import dataclasses
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from jaxeff.tree import combine, partition, Patterns, pytree

from .step import Aux, checked, Loss, replaced_entries, TrainState

# Of the delay compensation: Zheng et al. 2017, section 6, for CIFAR-10.
COMPENSATION = 0.04
# Times that a batch may be late while no other is done: not bad luck any more.
MOST_LATE = 5


class Work(NamedTuple):
    """What a worker is to do.

    Attributes:
        ticket: of this hand-out; the same batch given out again has another.
        batch: its number.
        params: the weights to compute the gradient at.
    """

    ticket: int
    batch: int
    params: PyTree


class Done(NamedTuple):
    """What a worker made of it.

    Attributes:
        grads: of the weights that train.
        aux: of the loss.
        loss: of the batch.
        examples: in it.
    """

    grads: PyTree
    aux: Aux
    loss: float
    examples: int


class Applied(NamedTuple):
    """An update, for the record.

    Attributes:
        batch, ticket, worker: whose gradient it was.
        staleness: updates between the weights it was computed at and those it changed.
    """

    batch: int
    ticket: int
    worker: str
    staleness: int


@pytree
class Kept:
    """All that an asynchronous run needs to go on.

    Attributes:
        state: its step is the number of updates.
        applied: which batches they were of.
    """

    state: TrainState
    applied: Bool[Array | np.ndarray, " steps"]

    @property
    def step(self) -> Any:
        """The number of updates, by which checkpoints are named."""
        return self.state.step


@dataclasses.dataclass
class _Out:
    """A batch that a worker has."""

    work: Work
    worker: str
    version: int
    due: float


class ParameterServer:
    """Keeps the weights, hands out batches, applies gradients as they come.

    Its methods may be called by several threads.
    """

    def __init__(
        self,
        kept: Kept,
        tx: optax.GradientTransformation,
        *,
        trainable: Patterns = "**",
        staleness: int,
        compensation: float | int = COMPENSATION,
        lease: float | int = 60,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Goes on from what was kept; `first_state` makes a new one.

        Args:
            kept: the state, and which batches it has seen.
            tx: the optimizer, of which there is one, here.
            trainable: patterns of the weights that train.
            staleness: the most updates that may come between the weights a gradient
                was computed at and those it is applied to. 0 is one worker after
                another; with w workers, 2 w lets all of them run freely.
            compensation: how much of the change that the weights made meanwhile is
                taken into a gradient: g + c g g (w_now - w_then). 0 is none.
            lease: seconds that a worker may take for a batch, ten times as many for its
                first; then another one gets it.
            clock: tells seconds.

        Raises:
            ValueError: a bound below 0, or a lease of no time.
        """
        check_bounds(staleness, compensation, lease)
        self.staleness, self.lease, self.clock = staleness, lease, clock
        # Copied: the caller's arrays stay the caller's.
        self._state = jax.tree.map(jnp.copy, kept.state)
        self._applied = np.array(kept.applied)
        self._todo = [int(i) for i in np.flatnonzero(~self._applied)][::-1]
        self._out: dict[int, _Out] = {}
        self._known: set[str] = set()
        self._late: Counter[int] = Counter()  # by batch, since the last update
        self._tickets = 0
        self._changed = threading.Condition()
        self._apply = jax.jit(_update(tx, trainable, compensation))
        self.log: list[Applied] = []
        self.losses: list[tuple[float, int]] = []  # and examples, of each update

    @property
    def version(self) -> int:
        """How many updates the weights have had."""
        return int(self._applied.sum())

    @property
    def finished(self) -> bool:
        """Whether every batch was applied."""
        return bool(self._applied.all())

    def kept(self) -> Kept:
        """The state as it is, to save or to end with."""
        with self._changed:
            return Kept(self._state, self._applied.copy())

    def since(self, seen: int) -> tuple[list[tuple[float, int]], Kept]:
        """The losses after the first `seen`, and the state that they led to."""
        with self._changed:
            return self.losses[seen:], self.kept()

    def take(self, worker: str, wait: float | int = 0) -> Work | None:
        """The next batch for a worker; None if there is none for it now.

        Args:
            worker: its name.
            wait: seconds that the call may wait for one.

        Raises:
            ValueError: batches take longer than their lease, whoever has them.
        """
        until = self.clock() + wait
        with self._changed:
            while True:
                self.expire()
                self._check_lease()
                if self._todo and self._may_begin():
                    return self._hand_out(worker)
                left = until - self.clock()
                if self.finished or left <= 0:
                    return None
                self._changed.wait(min(left, 0.5))

    def give(self, ticket: int, done: Done) -> bool:
        """Applies a gradient.

        Returns:
            Whether it counted: a ticket counts once, and not after its lease.
        """
        with self._changed:
            self.expire()  # it may be that nobody took a batch since
            out = self._out.get(ticket)
            if out is None:
                return False
            behind = self.version - out.version
            try:
                self._state = self._apply(
                    self._state,
                    out.work.params,
                    done.grads,
                    dict(done.aux.updates),
                    behind,
                )
            except Exception:
                # Or nobody would ever have this batch again.
                self._back([ticket])
                raise
            del self._out[ticket]
            self.log.append(Applied(out.work.batch, ticket, out.worker, behind))
            self.losses.append((done.loss, done.examples))
            self._applied[out.work.batch] = True
            self._late.clear()
            self._changed.notify_all()
            return True

    def leave(self, worker: str) -> None:
        """A worker is gone: others get what it had."""
        with self._changed:
            self._back([t for t, out in self._out.items() if out.worker == worker])
            self._known.discard(worker)

    def expire(self) -> None:
        """Takes back what was out for longer than its lease."""
        with self._changed:
            now = self.clock()
            late = [t for t, out in self._out.items() if out.due < now]
            self._late.update(self._out[ticket].work.batch for ticket in late)
            self._back(late)

    def _check_lease(self) -> None:
        for batch, times in self._late.items():
            if times >= MOST_LATE:
                raise ValueError(
                    f"a batch is done within its lease, but batch {batch} was late "
                    f"{times} times and no other was done meanwhile: the lease is "
                    f"{self.lease:g} s. Give a longer one, or make batches smaller."
                )

    def _may_begin(self) -> bool:
        """Whether all that is out stays fresh enough if one more begins.

        At worst a gradient waits until all others are applied, the new one with them.
        So nothing waits for its turn to be applied, and no work is in vain.
        """
        oldest = min((out.version for out in self._out.values()), default=self.version)
        return self.version - oldest + len(self._out) <= self.staleness

    def _hand_out(self, worker: str) -> Work:
        batch, ticket = self._todo.pop(), self._tickets
        self._tickets += 1
        work = Work(ticket, batch, self._state.params)
        # The first compiles.
        seconds = self.lease * (1 if worker in self._known else 10)
        self._known.add(worker)
        due = self.clock() + seconds
        self._out[ticket] = _Out(work, worker, self.version, due)
        return work

    def _back(self, tickets: list[int]) -> None:
        for ticket in tickets:
            self._todo.append(self._out.pop(ticket).work.batch)
        if tickets:
            self._changed.notify_all()


def check_bounds(staleness: int, compensation: float | int, lease: float | int) -> None:
    """Refuses what no `ParameterServer` can have.

    Raises:
        ValueError: a bound below 0, or a lease of no time.
    """
    if not (staleness >= 0 and compensation >= 0 and lease > 0):
        raise ValueError(
            f"staleness and compensation are 0 or more and a lease above 0 s, got "
            f"{staleness}, {compensation} and {lease}."
        )


def first_state(state: TrainState, steps: int) -> Kept:
    """A run that has seen nothing yet.

    Raises:
        ValueError: there are no steps, or the state has taken some.
    """
    if steps < 1 or int(state.step):
        raise ValueError(
            f"a run of 1 step or more begins at step 0, got {steps} steps and a state "
            f"of step {int(state.step)}."
        )
    return Kept(state, np.zeros(steps, bool))


def gradient(
    loss: Loss, trainable: Patterns = "**"
) -> Callable[[PyTree, Any, Any], tuple[PyTree, tuple[Array, Aux]]]:
    """`(params, batch, key) -> grads of what trains, (loss, Aux)`, jitted."""

    def of(params, batch, key):
        train, frozen = partition(params, trainable)

        def objective(train):
            value, aux = checked(loss(combine(train, frozen), batch, key))
            return value, (value, aux)

        return jax.grad(objective, has_aux=True)(train)

    return jax.jit(of)


def _update(
    tx: optax.GradientTransformation, trainable: Patterns, compensation: float | int
) -> Callable[[TrainState, PyTree, PyTree, Mapping[str, PyTree], Any], TrainState]:
    """`(state, weights then, gradients, updates, staleness) -> state`.

    Running averages move by how far the batch moved them, from wherever they are now,
    divided by 1 + staleness. Each pulls towards its batch with what it was then: with
    many workers all of them pull at once, and without the division the average swings
    further each time (24 workers and a momentum of 0.9 make variances negative).
    """

    def move(now, new, old, behind):
        if jnp.issubdtype(now.dtype, jnp.inexact):
            return now + ((new - old) / (1 + behind)).astype(now.dtype)
        if jnp.issubdtype(now.dtype, jnp.integer):
            return now + (new - old)
        return new  # a random key or a switch, of which there is no difference

    def update(state, then, grads, updates, behind):
        train, frozen = partition(state.params, trainable)
        if compensation:
            before, _ = partition(then, trainable)
            at_now = lambda g, now, old: g + compensation * g * g * (now - old)
            grads = jax.tree.map(at_now, grads, train, before)
        moves, opt_state = tx.update(grads, state.opt_state, train)
        params = combine(optax.apply_updates(train, moves), frozen)
        pull = functools.partial(move, behind=behind)
        new = replaced_entries(then, updates)
        moved = {
            name: jax.tree.map(pull, state.params[name], new[name], then[name])
            for name in updates
        }
        params = replaced_entries(params, moved)
        return TrainState(state.step + 1, params, opt_state, state.key, state.scaler)

    return update
