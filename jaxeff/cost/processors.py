"""Watts per core of common server and desktop processors.

The last resort of energy accounting: a processor without readable counters is
charged its thermal design power, shared evenly among its cores.

Source: TDP from CodeCarbon's `cpu_power.csv` (MIT), core counts from the vendors'
product pages. Cloud-only models (7B12, 7R13, 8175M, 8259CL, 8272CL, 8370C, 8375C)
have no product page: their figures are those of their nearest public sibling.
"""

import dataclasses
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Processor:
    """A processor's power, per physical core."""

    name: str
    watts: float  # TDP of the whole socket
    cores: int  # physical
    known: bool = True

    @property
    def watts_per_core(self) -> float:
        """The socket's TDP shared evenly among its cores."""
        return self.watts / self.cores

    def __str__(self) -> str:
        if not self.known:
            return f"{self.name or 'unnamed processor'}: not in the table, default"
        return f"{self.name}: TDP {self.watts:g} W / {self.cores} cores"


PROCESSORS = (
    Processor("AMD EPYC 7551", 180.0, 32),
    Processor("AMD EPYC 7742", 225.0, 64),
    Processor("AMD EPYC 7763", 280.0, 64),
    Processor("AMD EPYC 7B12", 240.0, 64),
    Processor("AMD EPYC 7R13", 225.0, 48),
    Processor("AMD EPYC 9454", 290.0, 48),
    Processor("AMD EPYC 9554", 360.0, 64),
    Processor("AMD EPYC 9654", 360.0, 96),
    Processor("AMD EPYC 9754", 360.0, 128),
    Processor("AMD EPYC 9755", 500.0, 128),
    Processor("AMD EPYC 9965", 500.0, 192),
    Processor("AMD Ryzen 9 5950X", 105.0, 16),
    Processor("AMD Ryzen 9 7950X", 170.0, 16),
    Processor("Intel Core i9-13900K", 125.0, 24),
    Processor("Intel Xeon E5-2680 v4", 120.0, 14),
    Processor("Intel Xeon E5-2686 v4", 145.0, 18),
    Processor("Intel Xeon E5-2690 v4", 135.0, 14),
    Processor("Intel Xeon E5-2699 v4", 145.0, 22),
    Processor("Intel Xeon Gold 6130", 125.0, 16),
    Processor("Intel Xeon Gold 6148", 150.0, 20),
    Processor("Intel Xeon Gold 6248", 150.0, 20),
    Processor("Intel Xeon Gold 6330", 205.0, 28),
    Processor("Intel Xeon Gold 6338", 205.0, 32),
    Processor("Intel Xeon Platinum 8175M", 240.0, 24),
    Processor("Intel Xeon Platinum 8180", 205.0, 28),
    Processor("Intel Xeon Platinum 8259CL", 210.0, 24),
    Processor("Intel Xeon Platinum 8272CL", 195.0, 26),
    Processor("Intel Xeon Platinum 8280", 205.0, 28),
    Processor("Intel Xeon Platinum 8358", 250.0, 32),
    Processor("Intel Xeon Platinum 8370C", 205.0, 32),
    Processor("Intel Xeon Platinum 8375C", 300.0, 32),
    Processor("Intel Xeon Platinum 8380", 270.0, 40),
    Processor("Intel Xeon Platinum 8480+", 350.0, 56),
    Processor("Intel Xeon Platinum 8490H", 350.0, 60),
)

# Middle of the table. Its ends are the bounds of an estimate for an unknown model.
DEFAULT_WATTS_PER_CORE = 6.0


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """This machine's processor, or the default per core where it is not known.

    Args:
        cpuinfo: a file with lines `model name : ...`, as Linux writes it.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    name = found.group(1).strip() if found else ""
    words = _words(name)
    for known in PROCESSORS:
        if words.issuperset(_words(known.name)):
            return known
    return Processor(name, DEFAULT_WATTS_PER_CORE, 1, known=False)


def _words(name: str) -> set[str]:
    # "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz" has all words of the table's name.
    clean = re.sub(r"\((r|tm)\)", " ", name.lower())
    return set(re.findall(r"[a-z0-9+-]+", clean))
