"""Numbers for optimizer states: each power of ten divided evenly, the larger finer.

Moments span many orders of magnitude even within a block of neighbours, so a grid
for them has to keep small ones apart from zero.

Without a sign they are for second moments, whose root divides. A small one that
became 0 would leave only epsilon to divide by and the weight would leap, so there is
no 0 among them: 4 bits have the even steps of Li et al.; 8 bits are those of Dettmers
et al., whose 0 gives way to half of the least number above it.

Sources: Dettmers et al. 2021, arXiv:2110.02861, section 2.2 and appendix F.1; the
numbers without zero: Li et al. 2023, arXiv:2309.01507, section 4.2.
"""

import dataclasses
import re

import numpy as np

from .grids import Grid, parser, Table


@dataclasses.dataclass(frozen=True)
class Dynamic(Table):
    """The dynamic tree numbers of 4 or 8 bits.

    Attributes:
        width: bits.
        signed: of either sign, and 0; if not, above 0 alone: of 8 bits twice as fine,
            of 4 sixteen even steps.
    """

    width: int
    signed: bool = True

    @property
    def name(self) -> str:
        """`dynamic8`; `udynamic8` without a sign."""
        return f"{'' if self.signed else 'u'}dynamic{self.width}"

    @property
    def levels(self) -> tuple[float, ...]:
        """Ascending; 2**width of them."""
        if self.width == 4 and not self.signed:
            return tuple((i + 1) / 16 for i in range(16))
        decades = self.width - 1
        found = [1.0]
        for i in range(decades):
            parts = 2**i if self.signed else 2 ** (i + 1)
            ends = np.linspace(0.1, 1, parts + 1)
            middle = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (i + 1 - decades)
            found += [*middle, *(-middle if self.signed else [])]
        least = 0.0 if self.signed else min(found) / 2
        return tuple(float(np.float32(x)) for x in sorted([least, *found]))


@parser
def _parse(name: str) -> Grid | None:
    found = re.fullmatch(r"(u?)dynamic([48])", name)
    return None if found is None else Dynamic(int(found[2]), signed=not found[1])
