"""How far a run is: a bar in a terminal, plain lines in a log.

The rate counts from the end of the first step and leaves out pauses, so that
neither compilation nor evaluation counts as training.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
)

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.1


class Progress:
    """Shows step, loss, rates and time left; only process 0 does."""

    def __init__(
        self,
        steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ):
        """Starts at `start_step` of `steps`.

        Args:
            steps: of the whole run.
            start_step: steps taken before, which count for the bar, not the rate.
            enabled: `False` shows nothing; the rates are there all the same.
            console: where to; stdout by default.
        """
        self.steps_per_second = self.examples_per_second = 0.0
        self._steps = steps
        self._began: tuple[int, float] | None = None  # step and time
        self._drawn = -float("inf")
        self._console = console or Console(highlight=False)
        self._shown = enabled and jax.process_index() == 0
        self._bar = None
        if self._shown and self._console.is_terminal:
            said = TextColumn("{task.description}")
            self._bar = Bar(
                BarColumn(), MofNCompleteColumn(), said, console=self._console
            )
            self._bar.add_task("", total=steps, completed=start_step)

    def update(self, step: int, loss: float, examples: int) -> None:
        """Says that `step` is done.

        Args:
            step: steps taken so far.
            loss: of that step.
            examples: per step.
        """
        now = time.monotonic()
        first, began = self._began = self._began or (step, now)
        if step > first:
            self.steps_per_second = (step - first) / max(now - began, 1e-9)
            self.examples_per_second = self.steps_per_second * examples
        wait = SECONDS_BETWEEN_LINES if self._bar is None else SECONDS_BETWEEN_FRAMES
        if not self._shown or (step < self._steps and now - self._drawn < wait):
            return
        self._drawn = now
        said = self._said(step, loss)
        if self._bar is None:
            self.say(f"step {step}/{self._steps}  {said}")
        else:
            (task,) = self._bar.task_ids
            self._bar.update(task, completed=step, description=said)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside does not count for the rates."""
        before = time.monotonic()
        yield
        if self._began is not None:
            step, began = self._began
            self._began = (step, began + time.monotonic() - before)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._shown:
            self._console.print(line, soft_wrap=True)

    def _said(self, step: int, loss: float) -> str:
        said = f"loss {loss:.4g}"
        if self.steps_per_second:
            seconds = (self._steps - step) / self.steps_per_second
            said += (
                f"  {self.steps_per_second:.3g} steps/s"
                f"  {self.examples_per_second:.0f} examples/s"
                f"  {timedelta(seconds=round(seconds))} left"
            )
        return said

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
