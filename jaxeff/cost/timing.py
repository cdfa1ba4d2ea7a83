"""How long a call takes: candidates interleaved, blocked, medians and quartiles.

A shared machine speeds up and slows down by the second, so what is measured one
after the other cannot be compared. Here every candidate runs once per round and
the rounds begin with another candidate each time: a slow second slows all of them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

Thunk = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds per call, from the call until its result is ready."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    repeats: int  # timed calls

    @property
    def method(self) -> str:
        """How it was measured, in words."""
        return (
            f"wall clock until the result is ready; median of {self.repeats} calls, "
            "quartiles as bounds; candidates interleaved"
        )


def measure_latency(
    thunks: Mapping[str, Thunk],
    *,
    repeats: int = 30,
    warmup: int = 3,
    max_seconds: float | int | None = None,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Times several calls against each other, one of each per round.

    Args:
        thunks: what to call, by name. A thunk should call something compiled;
            whatever compiles at the first call does so in the warm-up.
        repeats: timed calls of each.
        warmup: calls of each before the clock counts; at least 1.
        max_seconds: start no further round after this long, once every thunk
            was timed three times.
        progress: draw a bar while measuring (it vanishes at the end).
        clock: seconds, monotonic.

    Returns:
        Seconds per call, by name.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(
            f"repeats and warmup must be >= 1, got {repeats} and {warmup}: the first "
            "call compiles, so it cannot be timed."
        )
    names = list(thunks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("latency", total=repeats + 1)
        for name in names:
            for _ in range(warmup):
                jax.block_until_ready(thunks[name]())
        bar.advance(task)
        begin = clock()
        for done in range(repeats):
            late = max_seconds is not None and clock() - begin > max_seconds
            if late and done >= 3:
                break
            # Each round starts elsewhere: no candidate always follows the same one.
            start = done % max(len(names), 1)
            for name in names[start:] + names[:start]:
                before = clock()
                jax.block_until_ready(thunks[name]())
                seconds[name].append(clock() - before)
            bar.advance(task)
    return {name: _summary(times) for name, times in seconds.items()}


def _summary(times: list[float]) -> Latency:
    low, median, high = (float(q) for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return Latency(median, low, high, len(times))


def latency(fn: Callable[..., Any], *args: Any, **options: Any) -> Latency:
    """Seconds per call of `fn(*args)`, compiled with `jax.jit` first.

    Args:
        fn: the function, compiled or not.
        *args: what to call it with.
        **options: those of `measure_latency`.
    """
    compiled = jax.jit(fn)
    return measure_latency({"fn": lambda: compiled(*args)}, **options)["fn"]
