"""What an energy counter is, and the two that stand in where there is none.

A counter is started, polled at least every `period` seconds, and stopped; it then
gives joules, and bounds on them. Real counters (`rapl.py`, `nvml.py`) count whole
devices, whoever used them; an estimate from CPU time counts this process alone.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from .processors import Processor, PROCESSORS


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules, how they were found, and between which bounds they lie."""

    joules: float | int
    method: str
    low: float | int
    high: float | int

    @property
    def kwh(self) -> float:
        """The same in kilowatt-hours."""
        return self.joules / 3.6e6

    def __add__(self, other: "Energy") -> "Energy":
        method = self.method
        if other.method != method:
            method = f"{self.method} + {other.method}"
        return Energy(
            self.joules + other.joules,
            method,
            self.low + other.low,
            self.high + other.high,
        )

    def __truediv__(self, n: float | int) -> "Energy":
        return Energy(self.joules / n, self.method, self.low / n, self.high / n)


@runtime_checkable
class Counter(Protocol):
    """What `EnergyMeter` needs of a counter."""

    @property
    def period(self) -> float | None:
        """Seconds between polls, at most; `None` where it need not be polled."""
        ...

    def start(self) -> None:
        """Begins to count."""

    def poll(self) -> None:
        """Takes a reading on the way."""

    def stop(self) -> Energy:
        """Takes the last reading."""
        ...


class CpuTimeEstimate:
    """Energy of this process from the CPU time it used. Nothing is measured.

    Core-seconds times the watts of one core. As low: half of that, for a logical
    core may be half a physical one. As high: every core of the machine, busy or
    not, half as much again for memory and fans. An unknown processor widens the
    bounds by the range of the table.
    """

    period = None

    def __init__(
        self,
        cpu: Processor,
        cores: int,
        reason: str,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ):
        self.cpu, self.cores, self.reason = cpu, cores, reason
        self.clock, self.cpu_clock = clock, cpu_clock
        self.began = (0.0, 0.0)

    def start(self) -> None:
        """Remembers both clocks."""
        self.began = (self.clock(), self.cpu_clock())

    def poll(self) -> None:
        """Nothing: the clocks do not wrap."""

    def stop(self) -> Energy:
        """The energy since `start`."""
        wall, used = self.clock() - self.began[0], self.cpu_clock() - self.began[1]
        each = self.cpu.watts_per_core
        every = [p.watts_per_core for p in PROCESSORS]
        least, most = (each, each) if self.cpu.known else (min(every), max(every))
        joules = each * used
        method = (
            f"estimate, not measured: CPU time x {each:.3g} W per core "
            f"({self.cpu}; {self.reason})"
        )
        high = 1.5 * most * max(used, self.cores * wall)
        return Energy(joules, method, 0.5 * least * used, high)


class PowerTimesTime:
    """A stated or rated power times elapsed time. Nothing is measured.

    Args:
        watts, low, high: of everything counted together.
        method: says where the watts come from.
        clock: seconds, monotonic.
    """

    period = None

    def __init__(
        self,
        watts: float | int,
        method: str,
        *,
        low: float | int,
        high: float | int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.watts, self.method, self.clock = watts, method, clock
        self.low, self.high = low, high
        self.began = 0.0

    def start(self) -> None:
        """Remembers the time."""
        self.began = self.clock()

    def poll(self) -> None:
        """Nothing to read."""

    def stop(self) -> Energy:
        """The energy since `start`."""
        wall = self.clock() - self.began
        return Energy(wall * self.watts, self.method, wall * self.low, wall * self.high)
