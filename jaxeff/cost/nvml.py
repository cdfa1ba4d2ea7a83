"""NVML: energy and power of NVIDIA GPUs, through a module like `pynvml`.

The module is handed in, so nothing here depends on it being installed. Both
methods count whole boards, whoever used them.

Source: NVML `nvmlDeviceGetTotalEnergyConsumption` and `nvmlDeviceGetPowerUsage`;
Yang et al. 2024, "Part-time Power Measurements", arXiv:2312.02741, for the bounds.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .counters import Energy


class NvmlCounter:
    """The total-energy counters of GPUs, Volta and newer.

    Bounds: 5 % (the error of the sensors), and one update of the counter, up to
    0.1 s of the mean power. Shorter measurements are therefore worth little.
    """

    period = None
    update_seconds = 0.1

    def __init__(
        self,
        nvml: Any,
        handles: Sequence[Any],
        clock: Callable[[], float] = time.perf_counter,
        note: str = "",
    ):
        self.nvml, self.handles, self.clock = nvml, list(handles), clock
        self.note = note
        self.began = (0.0, 0)

    def _millijoules(self) -> int:
        read = self.nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(int(read(h)) for h in self.handles)

    def start(self) -> None:
        """Remembers where the counters stand."""
        self.began = (self.clock(), self._millijoules())

    def poll(self) -> None:
        """Nothing: 64 bits of millijoules do not wrap."""

    def stop(self) -> Energy:
        """The energy since `start`."""
        joules = (self._millijoules() - self.began[1]) / 1e3
        wall = max(self.clock() - self.began[0], 1e-9)
        off = 0.05 * joules + joules * self.update_seconds / wall
        method = (
            f"NVML energy counter ({len(self.handles)} GPU), whole board, "
            f"±5 % and one update (0.1 s){self.note}"
        )
        return Energy(joules, method, max(0.0, joules - off), joules + off)


class NvmlPower:
    """NVML's power readings times time, where a GPU has no energy counter.

    Readings are 0.1 s apart and joined by straight lines; bounds are 25 %, for
    the sensor may look at a quarter of the time only.
    """

    period = 0.1

    def __init__(
        self,
        nvml: Any,
        handles: Sequence[Any],
        clock: Callable[[], float] = time.perf_counter,
        note: str = "",
    ):
        self.nvml, self.handles, self.clock = nvml, list(handles), clock
        self.note = note
        self.joules = 0.0
        self.last = (0.0, 0.0)

    def _now(self) -> tuple[float, float]:
        read = self.nvml.nvmlDeviceGetPowerUsage  # milliwatts
        return self.clock(), sum(read(h) for h in self.handles) / 1e3

    def start(self) -> None:
        """Takes the first reading."""
        self.joules, self.last = 0.0, self._now()

    def poll(self) -> None:
        """Adds the trapezoid since the last reading."""
        now = self._now()
        self.joules += (now[0] - self.last[0]) * (now[1] + self.last[1]) / 2
        self.last = now

    def stop(self) -> Energy:
        """The energy since `start`."""
        self.poll()
        method = (
            f"NVML power x time ({len(self.handles)} GPU without an energy "
            f"counter), whole board, ±25 %{self.note}"
        )
        return Energy(self.joules, method, 0.75 * self.joules, 1.25 * self.joules)


def find_nvml(
    nvml: Any,
    count: int,
    visible: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    note: str = "",
) -> NvmlCounter | NvmlPower | str:
    """The counters of the GPUs in use, or the reason why there are none to read.

    Args:
        nvml: the module `pynvml`, or one like it; `None` where there is none.
        count: how many GPUs are in use.
        visible: which ones, as in `CUDA_VISIBLE_DEVICES`; `None` for the first.
        clock: seconds, monotonic.
        note: what to add to the method.
    """
    if nvml is None:
        return "NVML not installed (package nvidia-ml-py)"
    try:
        nvml.nvmlInit()
        handles = _handles(nvml, count, visible)
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    reason = ""
    for read, counter in (
        (nvml.nvmlDeviceGetTotalEnergyConsumption, NvmlCounter),
        (nvml.nvmlDeviceGetPowerUsage, NvmlPower),
    ):
        try:
            for handle in handles:
                read(handle)
            return counter(nvml, handles, clock, note)
        except nvml.NVMLError as error:
            reason = f"NVML: {error}"
    return reason


def _handles(nvml: Any, count: int, visible: str | None) -> list[Any]:
    # JAX numbers the visible GPUs from 0, NVML all of them.
    names = [n.strip() for n in visible.split(",")] if visible else []
    names = names[:count] if names else [str(i) for i in range(count)]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(n))
        if n.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(n)
        for n in names
    ]
