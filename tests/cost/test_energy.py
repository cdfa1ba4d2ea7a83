import os
import time

import jax
import jax.numpy as jnp
import pytest

from jaxeff.cost import (
    chip,
    Energy,
    EnergyMeter,
    estimate_energy,
    measure_energies,
    measure_energy,
)
from jaxeff.cost.processors import PROCESSORS


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeNvml:
    """A module like `pynvml`: GPUs that draw a constant power."""

    class NVMLError(Exception):
        pass

    def __init__(self, clock, watts, *, energy=True, power=True, init=True):
        self.clock, self.watts = clock, watts
        self.energy, self.power, self.init = energy, power, init

    def nvmlInit(self):
        if not self.init:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetHandleByUUID(self, name):
        return int(name.rsplit("-", 1)[1])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.energy:
            raise self.NVMLError("Not Supported")
        return int(1e3 * self.watts[handle] * self.clock())

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.power:
            raise self.NVMLError("Not Supported")
        return int(1e3 * self.watts[handle])


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def machine(tmp_path, clock):
    """A CPU without counters, whose clocks stand still."""
    (tmp_path / "cpuinfo").write_text("model name : AMD EPYC 7763 64-Core Processor\n")
    return {
        "powercap": tmp_path / "powercap",
        "cpuinfo": tmp_path / "cpuinfo",
        "clock": clock,
        "cpu_clock": clock,
        "nvml": None,
        "platform": "cpu",
    }


def zone(machine, name, microjoules, kind, *, size=10**9):
    folder = machine["powercap"] / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_memory_but_nothing_twice(machine):
    package = zone(machine, "intel-rapl:0", 1_000_000, "package-0")
    memory = zone(machine, "intel-rapl:0:1", 500_000, "dram")
    core = zone(machine, "intel-rapl:0:0", 0, "core")
    system = zone(machine, "intel-rapl:1", 0, "psys")
    with EnergyMeter(**machine) as meter:
        package.write_text("4000000")
        memory.write_text("1500000")
        core.write_text("2000000")  # a part of the package
        system.write_text("9000000")  # the whole machine
    assert meter.energy.joules == pytest.approx(4.0)
    assert meter.energy.low < 4.0 < meter.energy.high
    assert "RAPL" in meter.energy.method
    assert "dram, package-0" in meter.energy.method


def test_a_rapl_counter_that_wraps_still_counts_forward(machine):
    counter = zone(machine, "intel-rapl:0", 999_000_000, "package-0", size=10**9)
    with EnergyMeter(**machine) as meter:
        counter.write_text("2000000")
    assert meter.energy.joules == pytest.approx(3.0)


def test_a_rapl_counter_is_polled_so_that_two_wraps_are_both_seen(machine):
    from jaxeff.cost.rapl import RaplCounter

    path = zone(machine, "intel-rapl:0", 0, "package-0", size=10**6)
    counter = RaplCounter([path.parent])
    counter.start()
    for _ in range(4):  # 0.6 J each, where the counter holds 1 J
        path.write_text(str((int(path.read_text()) + 600_000) % 10**6))
        counter.poll()
    assert counter.stop().joules == pytest.approx(2.4)
    assert counter.period < 60


def test_rapl_without_permission_falls_back_and_says_why(machine):
    counter = zone(machine, "intel-rapl:0", 0, "package-0")
    # The superuser may read everything, so a folder in place of the file stands in
    # where the tests run as one.
    if os.geteuid() == 0:
        counter.unlink()
        counter.mkdir()
        reason = "incomplete"
    else:
        counter.chmod(0)
        reason = "no permission"
    with EnergyMeter(**machine) as meter:
        pass
    assert "not measured" in meter.energy.method
    assert reason in meter.energy.method


def test_without_counters_energy_is_cpu_time_times_watts_and_says_so(machine):
    with EnergyMeter(**machine) as meter:
        machine["clock"].now += 10.0
    energy = meter.energy
    assert energy.joules == pytest.approx(10 * 280 / 64)
    assert energy.low < energy.joules < energy.high
    assert "estimate, not measured" in energy.method
    assert "280 W / 64 cores" in energy.method
    assert "no RAPL counters" in energy.method


def test_an_unknown_processor_widens_the_bounds(machine):
    with EnergyMeter(**machine) as known:
        machine["clock"].now += 1.0
    machine["cpuinfo"].write_text("model name : Something New\n")
    with EnergyMeter(**machine) as unknown:
        machine["clock"].now += 1.0
    assert "default" in unknown.energy.method
    assert unknown.energy.low <= known.energy.low
    assert unknown.energy.high >= known.energy.high
    most = max(p.watts_per_core for p in PROCESSORS)
    assert unknown.energy.high >= most * 1.0


def gpu(machine, nvml, count=1, kind="NVIDIA H100 80GB HBM3", **options):
    return EnergyMeter(
        **{**machine, "platform": "gpu", "nvml": nvml, "kinds": [kind] * count},
        **options,
    )


def test_nvml_counts_the_energy_of_the_gpus_in_use(machine, clock):
    nvml = FakeNvml(clock, [100.0, 300.0, 500.0])
    with gpu(machine, nvml, count=2) as meter:
        clock.now += 5.0
    assert meter.energy.joules == pytest.approx(5 * 400)
    assert meter.energy.low < 2000 < meter.energy.high
    assert "NVML energy counter (2 GPU)" in meter.energy.method
    assert "host not counted" in meter.energy.method


def test_nvml_counts_the_visible_gpus_by_index_and_by_name(machine, clock):
    nvml = FakeNvml(clock, [100.0, 300.0, 500.0])
    for visible, watts in [("2", 500), ("1,0", 300), ("GPU-abc-2", 500)]:
        with gpu(machine, nvml, visible=visible) as meter:
            clock.now += 1.0
        assert meter.energy.joules == pytest.approx(watts, abs=0.01)


def test_the_host_counts_too_where_it_has_counters(machine, clock):
    host = zone(machine, "intel-rapl:0", 0, "package-0")
    with gpu(machine, FakeNvml(clock, [100.0])) as meter:
        clock.now += 1.0
        host.write_text("7000000")
    assert meter.energy.joules == pytest.approx(107)
    assert "NVML" in meter.energy.method and "RAPL" in meter.energy.method
    assert "not counted" not in meter.energy.method


def test_a_shorter_measurement_has_wider_bounds(machine, clock):
    nvml = FakeNvml(clock, [100.0])

    def spread(seconds):
        with gpu(machine, nvml) as meter:
            clock.now += seconds
        return (meter.energy.high - meter.energy.low) / meter.energy.joules

    assert spread(0.2) > spread(1.0) > spread(10.0) > 0.09


def test_without_an_energy_counter_power_is_integrated(machine, clock):
    with gpu(machine, FakeNvml(clock, [250.0], energy=False)) as meter:
        clock.now += 2.0
    assert meter.energy.joules == pytest.approx(500)
    assert "power x time" in meter.energy.method


def test_power_is_read_on_the_way_not_only_at_the_ends(machine):
    machine["clock"] = time.perf_counter
    nvml = FakeNvml(machine["clock"], [0.0], energy=False)
    with gpu(machine, nvml) as meter:
        time.sleep(0.05)
        nvml.watts = [1000.0]  # a burst that both ends miss
        time.sleep(0.3)
        nvml.watts = [0.0]
    assert 100 < meter.energy.joules < 600


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"energy": False, "power": False}, "Not Supported"),
        ({"init": False}, "Driver Not Loaded"),
        (None, "not installed"),
    ],
)
def test_without_nvml_rated_power_stands_in_and_says_why(
    machine, clock, options, reason
):
    nvml = None if options is None else FakeNvml(clock, [1.0], **options)
    with gpu(machine, nvml) as meter:
        clock.now += 2.0
    assert meter.energy.joules == pytest.approx(2 * 700)
    assert "not measured" in meter.energy.method
    assert reason in meter.energy.method
    assert meter.energy.low < meter.energy.joules <= meter.energy.high


def test_an_accelerator_of_unknown_power_is_refused_with_the_way_out(machine):
    with pytest.raises(ValueError, match="watts="):
        gpu(machine, None, kind="TPU v5 lite")
    with pytest.raises(ValueError, match="watts"):
        gpu(machine, None, kind="Some New Chip")


def test_stated_power_goes_before_every_counter(machine, clock):
    zone(machine, "intel-rapl:0", 0, "package-0")
    with EnergyMeter(**machine, watts=50.0) as meter:
        clock.now += 2.0
    assert meter.energy.joules == 100.0
    assert "stated 50 W" in meter.energy.method
    with pytest.raises(ValueError, match="> 0"):
        EnergyMeter(**machine, watts=-1.0)


def test_energy_is_not_known_before_the_block_has_ended(machine):
    with EnergyMeter(**machine) as meter:
        with pytest.raises(ValueError, match="ended"):
            _ = meter.energy


def test_the_meter_waits_for_what_is_still_being_computed(machine):
    machine["clock"] = machine["cpu_clock"] = time.perf_counter
    x = jnp.ones((1500, 1500))
    f = jax.jit(lambda a: a @ a @ a)
    f(x).block_until_ready()
    with EnergyMeter(**machine, watts=1.0) as meter:
        y = f(x)
    began = time.perf_counter()
    y.block_until_ready()
    assert time.perf_counter() - began < 0.5 * meter.energy.joules  # 1 W: seconds


def test_an_error_inside_the_block_is_the_one_that_is_seen(machine, clock):
    with pytest.raises(RuntimeError, match="mine"):
        with gpu(machine, FakeNvml(clock, [250.0], energy=False)):
            raise RuntimeError("mine")


def test_energy_per_call_does_not_depend_on_how_often_it_was_called(machine, clock):
    def work(seconds):
        def thunk():
            clock.now += seconds
            return jnp.zeros(())

        return thunk

    thunks = {"short": work(0.01), "long": work(0.05)}
    measured = measure_energies(thunks, seconds=1.0, rounds=2, **machine)
    assert measured["short"].joules == pytest.approx(0.01 * 280 / 64)
    assert measured["long"].joules == pytest.approx(0.05 * 280 / 64)
    assert measure_energy(thunks["long"], seconds=1.0, **machine).joules == (
        pytest.approx(measured["long"].joules)
    )
    with pytest.raises(ValueError, match="rounds"):
        measure_energies(thunks, rounds=0, **machine)


def test_this_machine_has_a_method_with_a_name_and_bounds():
    x = jnp.ones((200, 200))
    f = jax.jit(lambda a: a @ a)
    energy = measure_energy(lambda: f(x), seconds=0.05)
    assert energy.method
    assert 0 <= energy.low <= energy.joules <= energy.high
    assert energy.high > 0


def test_energies_add_with_their_bounds_and_methods():
    a, b = Energy(1.0, "a", 0.5, 2.0), Energy(3.0, "b", 2.0, 4.0)
    assert a + b == Energy(4.0, "a + b", 2.5, 6.0)
    assert (a + a).method == "a"
    assert (a + b) / 2 == Energy(2.0, "a + b", 1.25, 3.0)
    assert Energy(3.6e6, "a", 0, 3.6e6).kwh == 1.0


def test_flops_at_the_full_peak_take_the_rated_power():
    h100 = chip("NVIDIA H100 80GB HBM3")
    second = estimate_energy(h100.peak, h100, utilisation=1.0)
    assert second.joules == pytest.approx(700)
    half = estimate_energy(h100.peak, h100, utilisation=0.5)
    assert half.joules == pytest.approx(1400)
    assert (half.low, half.high) == (pytest.approx(700), pytest.approx(2800))
    assert "not measured" in half.method and "989" in half.method
    with pytest.raises(ValueError, match="utilisation"):
        estimate_energy(1e12, h100, utilisation=1.5)
    with pytest.raises(ValueError, match="TPU v5e"):
        estimate_energy(1e12, chip("TPU v5e"), utilisation=0.5)
