"""The training loop: steps, and beside them metrics, evaluation and checkpoints.

The host runs a little ahead of the devices: it reads the metrics of a step only
when later steps are already queued, so the devices never wait for it. It reads the
loss of every step, so it knows exactly where a run went wrong.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from jaxeff.precision import all_finite

from .checkpoint import Checkpoints, saved_steps
from .metrics import Metrics
from .progress import Progress
from .step import TrainState
from .watchdog import Watchdog

# Steps that may be queued while the host reads the metrics of an older one. With 2,
# `fit` measured 3 % slower on a busy machine than with 8; each holds its batch.
LAG = 8
# Dynamic loss scaling halves its scale at each skipped step. From 2^16 it comes to
# nothing in half as many steps, and then scaling is not what is wrong.
MOST_SKIPPED = 50


# A step, its examples and its metrics.
Queued = tuple[int, int, Mapping[str, Any]]


class NonFiniteLoss(ValueError):
    """A run was stopped because its loss or its weights are not finite.

    Attributes:
        step: the first step that showed it, counted from 1.
    """

    def __init__(self, what: str, step: int, folder: Path | None, last: int | None):
        self.step = step
        kept = (
            "No checkpoint was kept."
            if folder is None or last is None
            else f"The last good checkpoint is step {last} in {folder}."
        )
        super().__init__(
            f"training must stay finite, but {what} at step {step}, so it stopped. "
            f"{kept} Lower the learning rate, warm it up, or clip the gradients."
        )


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    state: TrainState,
    batches: Iterable[Any],
    *,
    steps: int,
    log_every: int = 50,
    metrics: Metrics | None = None,
    progress: bool = True,
    checkpoint: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    eval_fn: Callable[[PyTree], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    timeout: float | int | None = None,
) -> TrainState:
    """Trains until `steps` steps were taken in all, from wherever `state` is.

    To resume: restore the state, and give batches that start at its step.

    Args:
        step: from `make_train_step`; it donates the state it is given.
        state: the first state. Use the returned one afterwards.
        batches: one per step, from step `state.step` on.
        steps: how many steps the whole run has, with those taken before.
        log_every: steps between two lines of metrics.
        metrics: where the lines go.
        progress: show a bar, or plain lines where stdout is no terminal.
        checkpoint: where the state is saved, in the background, at the end and
            every `checkpoint_every` steps.
        checkpoint_every: steps between two checkpoints.
        eval_fn: `eval_fn(params) -> metrics`, called at the end and every
            `eval_every` steps.
        eval_every: steps between two evaluations.
        timeout: seconds without a finished step after which the process ends, with one
            line on stderr and status 75 (try again); for jobs of several processes,
            one of which may be gone or stuck. The first step, a checkpoint and an
            evaluation may take ten times as long. None waits for ever.

    Raises:
        NonFiniteLoss: the loss, or a weight about to be saved, is inf or nan. The
            checkpoints are those from before. (A step that loss scaling skipped
            may have any loss; 50 of them in a row may not.)
        ValueError: the batches end too early, the run is already past `steps`, or
            the folder holds checkpoints of a later step.
    """
    first = int(state.step)
    if first > steps:
        raise ValueError(
            f"the run is at step {first}, past the {steps} steps asked for. "
            "Ask for more steps, or start from an earlier checkpoint."
        )
    if checkpoint is not None:
        checkpoint.check_newer(first + 1)
    due = lambda n, every: n == steps or (every is not None and n % every == 0)
    stream = iter(batches)
    queued: deque[Queued] = deque()
    with (
        _guarded(timeout, checkpoint) as guard,
        Progress(steps, start_step=first, enabled=progress) as shown,
    ):
        stop = functools.partial(_not_finite, checkpoint=checkpoint)
        log = Log(shown, metrics, stop, log_every, steps)
        for n in range(first + 1, steps + 1):
            try:
                batch = next(stream)
            except StopIteration:
                raise ValueError(
                    f"a run of {steps} steps from step {first} takes "
                    f"{steps - first} batches, but they ended after {n - 1 - first}. "
                    "Give more batches, or ask for fewer steps."
                ) from None
            guard.look(queued)
            state, values = step(state, batch)
            for value in values.values():
                value.copy_to_host_async()
            queued.append((n, jax.tree.leaves(batch)[0].shape[0], values))
            save_to = checkpoint if due(n, checkpoint_every) else None
            evaluate = eval_fn if due(n, eval_every) else None
            # A state is saved only when every loss up to it is known to be finite.
            pause = save_to is not None or evaluate is not None or n == steps
            while len(queued) > (0 if pause else LAG):
                log.step(*queued.popleft())
                guard.finished(log.last)
            if pause:
                with shown.pause(), guard.seldom():
                    _save(save_to, state, n)
                    if evaluate is not None:
                        log.evaluation(n, evaluate(state.params))
        if checkpoint is not None:
            with guard.seldom():
                checkpoint.wait()
    return state


class _Guard:
    """What watches a loop; this one does nothing."""

    def finished(self, step: int) -> None:
        """A step is done."""

    def look(self, queued: Collection[Queued]) -> None:
        """Some of these may be done, though nobody has read them yet."""

    def seldom(self) -> AbstractContextManager:
        """What is done inside takes longer."""
        return nullcontext()


class _Timed(_Guard):
    """Ends the process where no step ends, or where another process has gone."""

    def __init__(self, seconds: float | int, checkpoint: Checkpoints | None):
        self.seconds, self.checkpoint, self.last = seconds, checkpoint, 0
        self.watchdog = Watchdog(seconds, self._stuck)

    def finished(self, step: int) -> None:
        self.last = max(self.last, step)
        self.watchdog.heard()

    def look(self, queued: Collection[Queued]) -> None:
        # After a pause it takes several steps until one is read. They are only heard
        # of: all processes read a step, and may stop at it, at the same point.
        ready = lambda values: all(value.is_ready() for value in values.values())
        done = [n for n, _, values in queued if ready(values)]
        # Of the first it hears when there is a second, which may compile anew.
        more = self.last > 0 or len(queued) > 1
        if more and done and done[-1] > self.last:
            self.finished(done[-1])

    def seldom(self) -> AbstractContextManager:
        return self.watchdog.seldom()

    def gone(self, error: Exception) -> None:
        """Ends this process, as it can't go on without the others."""
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.watchdog.end(
            f"the processes of a job have to answer each other, but after step "
            f"{self.last} one did not ({said[:120]}). {self._kept()}"
        )

    def _stuck(self) -> str:
        return (
            f"a step has to end within {self.seconds:g} s, but after step {self.last} "
            f"none did: a process of the job is stuck or gone. {self._kept()}"
        )

    def _kept(self) -> str:
        # Not `latest()`, which may ask the other processes.
        if self.checkpoint is None:
            return "No checkpoint was kept."
        steps = saved_steps(self.checkpoint.folder)
        if not steps:
            return f"There is no checkpoint in {self.checkpoint.folder} yet."
        return (
            f"The last checkpoint is step {steps[-1]} in {self.checkpoint.folder}: "
            "go on from there."
        )


@contextmanager
def _guarded(
    timeout: float | int | None, checkpoint: Checkpoints | None
) -> Iterator[_Guard]:
    if timeout is None:
        yield _Guard()
        return
    guard = _Timed(timeout, checkpoint)
    with guard.watchdog:
        try:
            yield guard
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            guard.gone(error)


_finite = jax.jit(all_finite)


def _not_finite(what: str, n: int, checkpoint: Checkpoints | None) -> NonFiniteLoss:
    if checkpoint is None:
        return NonFiniteLoss(what, n, None, None)
    return NonFiniteLoss(what, n, checkpoint.folder, checkpoint.latest())


def _save(checkpoint: Checkpoints | None, state: TrainState, n: int) -> None:
    if checkpoint is None:
        return
    # A finite loss may have had an infinite gradient.
    if not _finite(state.params):
        raise _not_finite("a weight is not finite", n, checkpoint)
    checkpoint.save(state)


class Log:
    """Reads the metrics of finished steps, judges the loss, and passes them on."""

    def __init__(
        self,
        shown: Progress,
        metrics: Metrics | None,
        stop: Callable[[str, int], NonFiniteLoss],
        log_every: int,
        steps: int,
    ):
        """Of a run of `steps`; `stop(what, step)` says what is not finite."""
        self.shown, self.metrics, self.stop = shown, metrics, stop
        self.log_every, self.steps = log_every, steps
        self.skipped = 0  # steps in a row
        self.last = 0  # step

    def step(self, n: int, examples: int, values: Mapping[str, Any]) -> None:
        """Step `n` is done."""
        numbers = {name: float(value) for name, value in values.items()}
        self.skipped = self.skipped + 1 if numbers.get("skipped") else 0
        if self.skipped > MOST_SKIPPED:
            what = f"no gradient was finite for {MOST_SKIPPED} steps"
            raise self.stop(what, n)
        if not math.isfinite(numbers["loss"]) and not self.skipped:
            what = f"the loss is {numbers['loss']}"
            raise self.stop(what, n)
        self.last = n
        self.shown.update(n, numbers["loss"], examples)
        if self.metrics is not None and (n % self.log_every == 0 or n == self.steps):
            rate = {"examples_per_second": self.shown.examples_per_second}
            self.metrics.write(n, numbers | rate)

    def evaluation(self, n: int, values: Mapping[str, float]) -> None:
        """An evaluation after step `n`."""
        numbers = {name: float(value) for name, value in values.items()}
        said = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.shown.say(f"step {n}: {said}")
        if self.metrics is not None:
            self.metrics.write(n, numbers)
