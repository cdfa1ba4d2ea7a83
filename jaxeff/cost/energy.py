"""Energy of a piece of work, by the best method the machine allows, always named.

In order: NVML energy counters (GPU), RAPL counters (CPU), NVML power times time,
rated power times time or CPU time. A step down that ladder is never silent: the
method says what was used and why nothing better was. `estimate_energy` needs no
machine at all: FLOPs over peak and utilisation, times rated power.
"""

import importlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import Progress

from .counters import Counter, CpuTimeEstimate, Energy, PowerTimesTime
from .hardware import Chip, chip
from .nvml import find_nvml
from .processors import processor
from .rapl import find_rapl
from .timing import Thunk

Clock = Callable[[], float]


class EnergyMeter:
    """`with EnergyMeter() as meter: ...`, then `meter.energy`.

    On entry and exit it waits for every array still being computed, for a counter
    that is read too early belongs to other work.

    Args:
        watts: use this power times time, whatever counters there are.
        platform: `cpu`, `gpu` or `tpu`; by default the one JAX runs on.
        kinds: `device_kind` of each accelerator; by default the local devices'.
        nvml: the module `pynvml` (package `nvidia-ml-py`), or one like it; `None`
            for none. By default it is imported where it is installed.
        visible: which GPUs count, as in `CUDA_VISIBLE_DEVICES` (the default).
        powercap, cpuinfo: where Linux shows RAPL counters and the processor.
        clock, cpu_clock: seconds, of the wall and of this process.

    Raises:
        ValueError: an accelerator whose energy cannot even be estimated.
    """

    def __init__(
        self,
        *,
        watts: float | int | None = None,
        platform: str | None = None,
        kinds: Sequence[str] | None = None,
        nvml: Any = "import",
        visible: str | None = None,
        powercap: Path = Path("/sys/class/powercap"),
        cpuinfo: Path = Path("/proc/cpuinfo"),
        clock: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
    ):
        if platform is None:
            platform = jax.default_backend()
        if kinds is None:
            kinds = [d.device_kind for d in jax.local_devices()]
        if nvml == "import":
            nvml = _import_nvml()
        if visible is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        counters: list[Counter]
        if watts is not None:
            if watts <= 0:
                raise ValueError(f"watts must be > 0, got {watts}.")
            # As good as the statement: there is nothing to bound it by.
            method = f"estimate, not measured: stated {watts:g} W x time"
            counters = [
                PowerTimesTime(watts, method, low=watts, high=watts, clock=clock)
            ]
        elif platform == "cpu":
            counters = [_cpu_counter(powercap, cpuinfo, clock, cpu_clock)]
        else:
            counters = _accelerator(platform, kinds, nvml, visible, powercap, clock)
        self._counters = counters
        self._energy: Energy | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def energy(self) -> Energy:
        """The energy of the block, once it has ended."""
        if self._energy is None:
            raise ValueError(
                "the energy is known when the `with EnergyMeter() as meter:` block "
                "has ended; read meter.energy after it."
            )
        return self._energy

    def __enter__(self) -> "EnergyMeter":
        wait_for_devices()
        self._stop.clear()
        for counter in self._counters:
            counter.start()
        polled = [c for c in self._counters if c.period is not None]
        self._threads = [
            threading.Thread(target=self._poll, args=(c,), daemon=True) for c in polled
        ]
        for thread in self._threads:
            thread.start()
        return self

    def _poll(self, counter: Counter) -> None:
        while not self._stop.wait(counter.period):
            counter.poll()

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                wait_for_devices()
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        parts = [counter.stop() for counter in self._counters]
        total = parts[0]
        for part in parts[1:]:
            total += part
        self._energy = total


def wait_for_devices() -> None:
    """Blocks until every array that is still alive has been computed."""
    jax.block_until_ready([a for a in jax.live_arrays() if not a.is_deleted()])


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _cpu_counter(
    powercap: Path, cpuinfo: Path, clock: Clock, cpu_clock: Clock
) -> Counter:
    rapl = find_rapl(powercap)
    if not isinstance(rapl, str):
        return rapl
    cores = os.cpu_count() or 1
    return CpuTimeEstimate(processor(cpuinfo), cores, rapl, clock, cpu_clock)


def _accelerator(
    platform: str,
    kinds: Sequence[str],
    nvml: Any,
    visible: str | None,
    powercap: Path,
    clock: Clock,
) -> list[Counter]:
    """Counters of the accelerators, and of the host where it has RAPL."""
    rapl = find_rapl(powercap)
    host, note = ([], f"; host not counted: {rapl}")
    if not isinstance(rapl, str):
        host, note = ([rapl], "")
    counter: Counter | str = "no NVIDIA GPU"
    if platform == "gpu":
        counter = find_nvml(nvml, len(kinds), visible, clock, note)
    if isinstance(counter, str):
        counter = _rated_power(kinds, f"{counter}{note}", clock)
    return [counter, *host]


def _rated_power(kinds: Sequence[str], reason: str, clock: Clock) -> Counter:
    chips = [chip(kind) for kind in kinds]
    unknown = [c.name for c in chips if c.watts is None]
    if unknown:
        raise ValueError(
            f"no counter can be read ({reason}) and no rated power is published for "
            f"{unknown[0]}. State the power of all devices together: "
            "EnergyMeter(watts=...)."
        )
    watts = sum((c.watts or 0.0) / c.devices for c in chips)
    method = (
        f"estimate, not measured: rated {watts:g} W ({len(chips)} x {chips[0].name}) "
        f"x time ({reason})"
    )
    # An idle board draws about a tenth of its rating; none draws much more than it.
    return PowerTimesTime(watts, method, low=0.1 * watts, high=watts, clock=clock)


def measure_energies(
    thunks: Mapping[str, Thunk],
    *,
    seconds: float | int = 0.5,
    rounds: int = 3,
    progress: bool = False,
    **meter: Any,
) -> dict[str, Energy]:
    """Energy per call of several calls, in interleaved rounds.

    Args:
        thunks: what to call, by name.
        seconds: how long to repeat each, in all. Counters tick ten times a second
            (NVML) to a thousand times (RAPL).
        rounds: over how many rounds to spread them.
        progress: draw a bar while measuring.
        **meter: options of `EnergyMeter`.

    Returns:
        Energy of one call, by name.
    """
    if seconds <= 0 or rounds < 1:
        raise ValueError(f"seconds must be > 0, rounds >= 1: {seconds}, {rounds}.")
    clock = meter.get("clock", time.perf_counter)
    totals: dict[str, Energy] = {}
    calls = dict.fromkeys(thunks, 0)
    for thunk in thunks.values():
        jax.block_until_ready(thunk())  # compiles; no part of the energy
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("energy", total=rounds * len(thunks))
        for _ in range(rounds):
            for name, thunk in thunks.items():
                with EnergyMeter(**meter) as counting:
                    begin = clock()
                    while True:
                        jax.block_until_ready(thunk())
                        calls[name] += 1
                        if clock() - begin >= seconds / rounds:
                            break
                energy = counting.energy
                totals[name] = totals[name] + energy if name in totals else energy
                bar.advance(task)
    return {name: total / calls[name] for name, total in totals.items()}


def measure_energy(thunk: Thunk, **options: Any) -> Energy:
    """Energy per call of one call; options as for `measure_energies`."""
    return measure_energies({"call": thunk}, **options)["call"]


def estimate_energy(
    flops: float | int,
    device: Chip,
    *,
    utilisation: float | int,
    low: float | int | None = None,
    high: float | int | None = None,
) -> Energy:
    """Energy of so many FLOPs on a chip that is not here.

    FLOPs over (peak times utilisation) is time, times rated power is energy.

    Args:
        flops: of the work.
        device: a chip of the table: `chip("NVIDIA H100 80GB HBM3")`.
        utilisation: the share of the peak reached, in (0, 1]; 0.3 to 0.5 for large
            training runs, a few per cent for small batches.
        low, high: bounds on the utilisation; a factor of two each way by default.
    """
    low = utilisation / 2 if low is None else low
    high = min(1.0, 2 * utilisation) if high is None else high
    if not 0 < low <= utilisation <= high <= 1:
        raise ValueError(
            "0 < low <= utilisation <= high <= 1 must hold, got "
            f"{low}, {utilisation}, {high}."
        )
    if device.watts is None:
        raise ValueError(
            f"no rated power is published for {device.name}: make a Chip with watts."
        )
    full = flops / device.peak * device.watts / device.devices
    method = (
        f"estimate, not measured: FLOPs / ({device.peak / 1e12:g} TFLOP/s x "
        f"{utilisation:g}) x {device.watts / device.devices:g} W ({device.name})"
    )
    return Energy(full / utilisation, method, full / high, full / low)
