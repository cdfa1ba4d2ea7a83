"""RAPL: the energy counters of Intel and AMD processors, as Linux shows them.

They count the package and the memory of a whole socket, every process on it, and
wrap around at `max_energy_range_uj`, minutes apart at full power. Bounds are 5 %,
about the error found against power meters.

Source: Linux `Documentation/power/powercap`; Khan et al. 2018, "RAPL in Action",
ACM TOMPECS 3(2).
"""

from collections.abc import Sequence
from pathlib import Path

from .counters import Energy


class RaplCounter:
    """The counters of the given powercap zones, added up.

    Args:
        zones: folders with `name`, `energy_uj` and `max_energy_range_uj`.
        period: seconds between polls; less than a counter takes to go round.
    """

    def __init__(self, zones: Sequence[Path], *, period: float = 30.0):
        self.period = period
        self.zones = list(zones)
        self.names = [_read(z / "name") for z in zones]
        self.ranges = [int(_read(z / "max_energy_range_uj")) for z in zones]
        self.microjoules = 0
        self.last: list[int] = []

    def _now(self) -> list[int]:
        return [int(_read(z / "energy_uj")) for z in self.zones]

    def start(self) -> None:
        """Remembers where the counters stand."""
        self.microjoules, self.last = 0, self._now()

    def poll(self) -> None:
        """Adds what was counted since the last reading."""
        now = self._now()
        for before, after, size in zip(self.last, now, self.ranges, strict=True):
            wrapped = size if after < before else 0
            self.microjoules += after - before + wrapped
        self.last = now

    def stop(self) -> Energy:
        """The energy since `start`."""
        self.poll()
        joules = self.microjoules / 1e6
        zones = ", ".join(sorted(set(self.names)))
        method = f"RAPL counters ({zones}), whole socket, ±5 %"
        return Energy(joules, method, 0.95 * joules, 1.05 * joules)


def find_rapl(root: Path = Path("/sys/class/powercap")) -> RaplCounter | str:
    """The machine's RAPL counters, or the reason why there are none to read."""
    zones = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = _read(zone / "name")
            # Not `core` and `uncore`, parts of the package, nor `psys`, its whole.
            if name.startswith("package") or name == "dram":
                int(_read(zone / "energy_uj"))
                int(_read(zone / "max_energy_range_uj"))
                zones.append(zone)
        except PermissionError:
            return f"no permission to read {zone / 'energy_uj'}"
        except (OSError, ValueError):
            return f"{zone} is incomplete"
    return RaplCounter(zones) if zones else f"no RAPL counters under {root}"


def _read(path: Path) -> str:
    return path.read_text().strip()
