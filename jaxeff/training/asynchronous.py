"""Asynchronous data parallelism on Ray: workers that wait for nobody.

    run = Asynchronous(problem, steps=2000, workers=4, folder="runs/asynchronous")
    run.add_worker()  # at any time
    state = run.wait()

One process keeps the weights (`server.py`); each worker takes a batch and the weights,
and gives a gradient back. A worker that dies is replaced, one that is stuck loses its
batch to another, and one more may come at any time: the others don't notice.

`problem` is called in every process, so whatever a worker needs, it makes itself.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import optax
from jaxtyping import Array, Key, PyTree

from jaxeff.precision import all_finite
from jaxeff.tree import Patterns

from .checkpoint import Checkpoints
from .extras import require
from .loop import Log, NonFiniteLoss
from .metrics import Metrics
from .progress import Progress
from .ray_cluster import Cluster, connected
from .server import (
    Applied,
    check_bounds,
    COMPENSATION,
    Done,
    first_state,
    gradient,
    ParameterServer,
)
from .step import init_state, Loss, TrainState

# Seconds that a call waits for work before it asks again, and between two looks.
WAIT, LOOK = 1.0, 0.2


class Problem(NamedTuple):
    """What is trained.

    Attributes:
        loss: `loss(params, batch, key) -> (scalar, Aux)`.
        tx: the optimizer, of which there is one, at the server.
        params: the first weights.
        batch: `batch(number)`, the same in every process.
        key: of the run; batch b draws from `fold_in(key, b)`.
        trainable: patterns of the weights that train.
    """

    loss: Loss
    tx: optax.GradientTransformation
    params: PyTree
    batch: Callable[[int], Any]
    key: Key[Array, ""]
    trainable: Patterns = "**"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the server keeps the weights; see `ParameterServer`.

    Attributes:
        steps: batches of the whole run.
        staleness: the most updates that a gradient may be behind.
        compensation: of the delay.
        lease: seconds for a batch.
        folder: for checkpoints, of a path that the server sees.
        checkpoint_every: updates between two; one is made at the end in any case.
    """

    steps: int
    staleness: int
    compensation: float | int
    lease: float | int
    folder: Path | None
    checkpoint_every: int


class Status(NamedTuple):
    """How far a run is.

    Attributes:
        losses: with the examples of each, since the last look.
        saved: the last checkpoint's step.
        broken: the step whose weights were to be saved, but are not finite.
    """

    losses: list[tuple[float, int]]
    saved: int | None
    broken: int | None


class _Server:
    """The server in its own process, and its checkpoints."""

    def open(self, problem: Callable[[], Problem], options: Options) -> int:
        """Makes or restores the state; returns the updates there were before.

        Not in `__init__`: Ray tells of an actor that could not be made only that it
        is gone.
        """
        p, self.options = problem(), options
        state = init_state(p.params, p.tx, p.key, trainable=p.trainable)
        kept = first_state(state, options.steps)
        self.checkpoints: Checkpoints | None = None
        self.saved: int | None = None
        if options.folder is not None:
            self.checkpoints = Checkpoints(options.folder)
            self.saved = self.checkpoints.latest()
            if self.saved is not None:
                kept = self.checkpoints.restore(kept)
        self.server = ParameterServer(
            kept,
            p.tx,
            trainable=p.trainable,
            staleness=options.staleness,
            compensation=options.compensation,
            lease=options.lease,
        )
        self.seen = 0
        return self.server.version

    def take(self, worker: str) -> tuple[bool, Any]:
        """Whether all is done; and the work, in arrays of NumPy."""
        work = self.server.take(worker, WAIT)
        return self.server.finished, None if work is None else jax.device_get(work)

    def give(self, ticket: int, done: Done) -> bool:
        """See `ParameterServer`."""
        return self.server.give(ticket, done)

    def leave(self, worker: str) -> None:
        """See `ParameterServer`."""
        self.server.leave(worker)

    def finished(self) -> bool:
        """See `ParameterServer`."""
        return self.server.finished

    def look(self) -> Status:
        """What happened since the last look; saves what is due."""
        losses, kept = self.server.since(self.seen)
        self.seen += len(losses)
        finite = all(math.isfinite(loss) for loss, _ in losses)
        version, every = int(kept.step), self.options.checkpoint_every
        due = version // every > (self.saved or 0) // every or kept.applied.all()
        broken: int | None = None
        if (
            self.checkpoints is not None
            and finite
            and due
            and version > (self.saved or 0)
        ):
            # A finite loss may have had an infinite gradient.
            if all_finite(kept.state.params):
                self.checkpoints.save(kept)
                self.saved = version
            else:
                broken = version
        return Status(losses, self.saved, broken)

    def end(self) -> tuple[Any, list[Applied]]:
        """The weights and optimizer state at the end, and the record of all updates."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        kept = self.server.kept()
        numbers = jax.device_get((kept.state.params, kept.state.opt_state))
        return numbers, self.server.log


class _Worker:
    """A process that computes gradients."""

    def pid(self) -> int:
        """Of the process."""
        return os.getpid()

    def work(
        self, problem: Callable[[], Problem], server: Any, name: str, opened: list
    ) -> None:
        """From when the server is open, which `opened` waits for, until all is done."""
        import ray

        p = problem()
        grad = gradient(p.loss, p.trainable)
        ray.get(opened)
        while True:
            finished, work = ray.get(server.take.remote(name))
            if finished:
                return
            if work is None:
                continue
            batch = p.batch(work.batch)
            key = jr.fold_in(p.key, work.batch)
            grads, (value, aux) = jax.device_get(grad(work.params, batch, key))
            examples = jax.tree.leaves(batch)[0].shape[0]
            done = Done(grads, aux, float(value), examples)
            ray.get(server.give.remote(work.ticket, done))


class _Member(NamedTuple):
    name: str
    actor: Any
    pid: Any  # to come


class Asynchronous:
    """A run on Ray; its processes end with `wait`, or with the `with` block."""

    def __init__(
        self,
        problem: Callable[[], Problem],
        *,
        steps: int,
        workers: int,
        staleness: int | None = None,
        compensation: float | int = COMPENSATION,
        lease: float | int = 60,
        restarts: int = 3,
        folder: str | Path | None = None,
        checkpoint_every: int = 500,
        worker_options: Mapping[str, Any] | None = None,
    ):
        """Starts the server and the workers, on the cluster that Ray is connected to.

        Where `ray.init` was not called, this machine is the cluster.

        Args:
            problem: makes the problem; called once in each process.
            steps: batches of the whole run.
            workers: to begin with.
            staleness: the most updates that a gradient may be behind; by default twice
                the workers.
            compensation: of the delay; see `ParameterServer`.
            lease: seconds that a worker may take for a batch.
            restarts: how many workers that died are replaced.
            folder: for checkpoints; a run goes on from the last one there.
            checkpoint_every: updates between two checkpoints.
            worker_options: what Ray gives each worker, such as {"num_gpus": 1}; by
                default a CPU.

        Raises:
            ValueError: a number that no run can have, or Ray is not installed.
        """
        if workers < 1 or restarts < 0 or checkpoint_every < 1 or steps < 1:
            raise ValueError(
                f"a run has 1 or more steps and workers, saves every 1 or more steps "
                f"and starts 0 or more workers again, got steps={steps}, "
                f"workers={workers}, checkpoint_every={checkpoint_every}, "
                f"restarts={restarts}."
            )
        staleness = 2 * workers if staleness is None else staleness
        check_bounds(staleness, compensation, lease)
        require("ray", "asynchronous runs")
        # A core is no more than a name here: workers share what there is.
        cores = max(os.cpu_count() or 1, workers + 4)
        self._cluster = None if connected() else Cluster(cores)
        import ray

        self.steps, self.restarts, self._problem = steps, restarts, problem
        self.folder = None if folder is None else Path(folder).resolve()
        options = Options(
            steps=steps,
            staleness=staleness,
            compensation=compensation,
            lease=lease,
            folder=self.folder,
            checkpoint_every=checkpoint_every,
        )
        # It adds, and leaves accelerators to the workers. Each worker's call waits in a
        # thread.
        server: Any = ray.remote(_Server).options(
            num_cpus=0,
            max_concurrency=1000,
            runtime_env={"env_vars": {"JAX_PLATFORMS": "cpu"}},
        )
        self._worker: Any = ray.remote(_Worker).options(
            **(worker_options or {"num_cpus": 1})
        )
        self._server: Any = server.remote()
        self._first = self._server.open.remote(problem, options)
        self._working: dict[Any, _Member] = {}  # by the result to come
        self._names = 0
        self._closed = False
        self.log: list[Applied] = []
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> str:
        """Starts one more; returns its name.

        Raises:
            ValueError: the run is over.
        """
        self._check_open()
        name = f"worker {self._names}"
        self._names += 1
        actor = self._worker.remote()
        pid = actor.pid.remote()
        # In a list, or Ray would wait for it before the worker makes its problem.
        result = actor.work.remote(self._problem, self._server, name, [self._first])
        self._working[result] = _Member(name, actor, pid)
        return name

    def pids(self) -> dict[str, int]:
        """The process of each worker that has one by now, on whatever machine."""
        import ray

        found = {}
        for member in self._working.values():
            with contextlib.suppress(ray.exceptions.RayError):
                found[member.name] = ray.get(member.pid, timeout=0)
        return found

    def wait(
        self,
        *,
        progress: bool = True,
        metrics: Metrics | None = None,
        log_every: int = 50,
        on_look: Callable[["Asynchronous", int], None] | None = None,
    ) -> TrainState:
        """Waits for the end of the run.

        Args:
            progress: show a bar, or lines where stdout is no terminal.
            metrics: where the lines of metrics go.
            log_every: updates between two of them.
            on_look: called a few times per second with the run and its updates.

        Returns:
            The state after the last update; `log` has the record of all since the start
            or the checkpoint.

        Raises:
            NonFiniteLoss: a loss, or a weight about to be saved, is inf or nan.
            ValueError: no worker is left and none may be started again, or the server
                is gone, or the run is over.
        """
        self._check_open()
        import ray

        saved: int | None = None
        stop = lambda what, n: NonFiniteLoss(what, n, self.folder, saved)
        try:
            n = ray.get(self._first)
            with Progress(self.steps, start_step=n, enabled=progress) as shown:
                log = Log(shown, metrics, stop, log_every, self.steps)
                while n < self.steps:
                    ray.wait(list(self._working), timeout=LOOK)
                    told: Status = ray.get(self._server.look.remote())
                    saved = told.saved
                    for loss, examples in told.losses:
                        n += 1
                        log.step(n, examples, {"loss": loss})
                    if told.broken is not None:
                        raise stop("a weight is not finite", told.broken)
                    self._replace(shown)
                    if on_look is not None:
                        on_look(self, n)
            (params, opt_state), self.log = ray.get(self._server.end.remote())
        except ray.exceptions.RayTaskError as error:
            # Whose own message is the traceback in its process.
            raise (error.cause or error) from error
        except ray.exceptions.RayActorError:
            raise ValueError(
                "the process that keeps the weights is gone. "
                + _kept(self.folder, "Start again to go on from the last of them.")
            ) from None
        finally:
            self.close()
        p = self._problem()
        like = init_state(p.params, p.tx, p.key, trainable=p.trainable)
        step = like.step + self.steps
        return TrainState(step, params, opt_state, like.key, like.scaler)

    def _replace(self, shown: Progress) -> None:
        """Notices who is gone; a fault in the problem would come again, and stops."""
        import ray

        for result in list(self._working):
            if not ray.wait([result], timeout=0)[0]:
                continue
            name = self._working.pop(result).name
            try:
                ray.get(result)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:
                ray.get(self._server.leave.remote(name))
                comes = ""
                if self.restarts > 0:
                    self.restarts -= 1
                    comes = f", {self.add_worker()} comes"
                shown.say(f"{name} is gone{comes}")
        if self._working:
            return
        # Workers return when all is done, which may be after the last look.
        if not ray.get(self._server.finished.remote()):
            raise ValueError(
                "no worker is left, and no more may be started again. "
                + _kept(self.folder, "Give more restarts.")
            )

    def close(self) -> None:
        """Ends all processes of the run."""
        import ray

        closed, self._closed = self._closed, True
        if closed or not ray.is_initialized():
            return
        for member in self._working.values():
            ray.kill(member.actor)
        ray.kill(self._server)
        self._working.clear()
        if self._cluster is not None:
            self._cluster.close()

    def _check_open(self) -> None:
        # Without its processes Ray would end this one too.
        if self._closed:
            raise ValueError(
                "a run is waited for once, and this one is over. "
                + _kept(self.folder, "Make another Asynchronous to go on.")
            )

    def __enter__(self) -> "Asynchronous":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kept(folder: Path | None, way_out: str) -> str:
    where = "No checkpoint was kept." if folder is None else f"Checkpoints: {folder}."
    return f"{where} {way_out}"
