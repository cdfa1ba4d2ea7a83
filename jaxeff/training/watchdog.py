"""Ends a process of a job whose other processes don't answer any more.

A step of several processes is finished by all of them or by none. Where one is stuck,
the others wait inside of the runtime, which nothing in Python can interrupt, and JAX
waits for ever as long as the stuck one is alive. So a thread beside the loop looks at
the clock. Every process sees the same steps end, so each can tell by itself.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What a program says that may succeed when it is tried again (sysexits.h).
TRY_AGAIN = 75
# How much longer what happens seldom may take: compiling, an evaluation, a checkpoint.
SELDOM = 10


class Watchdog:
    """A thread that ends the process when nothing has been heard for too long.

    with Watchdog(60, lambda: "step 12 did not end") as watchdog:
        for batch in batches:
            ...
            watchdog.heard()

    The first word may take ten times as long, as the first step of a run compiles.

    Args:
        seconds: how long, above 0.
        why: what to say then, in one line.

    Raises:
        ValueError: `seconds` is not above 0.
    """

    def __init__(self, seconds: float | int, why: Callable[[], str]):
        if not seconds > 0:
            raise ValueError(f"a time-out is above 0 seconds, got {seconds}.")
        self.seconds, self.why = seconds, why
        self._limit = SELDOM * seconds
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        """The process goes on."""
        self._last, self._limit = time.monotonic(), self.seconds

    @contextmanager
    def seldom(self) -> Iterator[None]:
        """What is done inside may take ten times as long."""
        self._last, self._limit = time.monotonic(), SELDOM * self.seconds
        yield
        self.heard()

    def end(self, message: str) -> None:
        """Says why in one line, and ends the process: nothing is waited for."""
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(TRY_AGAIN)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self._limit:
                self.end(self.why())

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
