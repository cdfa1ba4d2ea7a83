"""Formats: which numbers a weight is rounded to, and which weights share a scale.

A format is a plain value; `arrays.quantize_array` applies it. What it needs to know
of a weight are its shape and which of its dims are summed.
"""

import dataclasses
import math
from collections.abc import Sequence

from .floating import floating, Native
from .grids import Grid, named
from .linear import Linear
from .logarithmic import Logarithmic

SCALES = ("float32", "e8m0", "e4m3", "none")
RANGES = ("minmax", "average", "mse", "entropy")


@dataclasses.dataclass(frozen=True)
class Format:
    """`w ≈ grid's number * scale`, with a scale for each block of weights.

    Attributes:
        grid: the numbers.
        group: how many weights that are summed together share a scale, counted
            along the last of the summed dims; None: all that one output sums.
        outputs: how many neighbouring outputs share it; None: all of them.
        scale: how scales are stored. "float32"; "e8m0": powers of two in 8 bits, as
            OCP MX formats have them; "e4m3": 8-bit floats, times one float32 for
            the whole weight; "none": all are 1.
        activations: the grid ("int8", "e4m3") to which what meets the weight is
            rounded too: products of two grids of integers, or of two of 8-bit
            floats, then run on these. None: activations stay as they are.
        range: how the scale of activations is found. None: from the activations as
            they arrive, one for each row (for a convolution, for each example).
            Else once, from calibration data, so that the grid reaches "minmax":
            their largest magnitude; "average": the mean of that over the batches; a
            number: that percentile of their magnitudes; "mse": where they are
            rounded with the least squared error; "entropy": with the least
            divergence. Under a range that is known beforehand NaN is rounded to 0.
    """

    grid: Grid
    _: dataclasses.KW_ONLY
    group: int | None = None
    outputs: int | None = 1
    scale: str = "float32"
    activations: str | None = None
    range: str | float | None = None

    def __post_init__(self):
        if not isinstance(self.grid, Grid):
            raise ValueError(
                f"a format is made of a grid, such as Linear(4) or Logarithmic(4), got "
                f"{self.grid!r}. Formats with a name are there already: "
                "`quantization.int4`."
            )
        for name, n in (("group", self.group), ("block of outputs", self.outputs)):
            if n is not None and (not isinstance(n, int) or n < 1):
                raise ValueError(
                    f"a {name} holds at least 1 weight, got {n!r}. Write a whole "
                    "number, or leave it out for one scale per output channel."
                )
        if self.scale not in SCALES:
            raise ValueError(
                f"scales are stored as one of {', '.join(SCALES)}, got {self.scale!r}."
            )
        if self.grid.has_zero_point and self.scale != "float32":
            raise ValueError(
                f"a zero point goes with scales of float32, got {self.scale!r} for "
                f"{self.grid.name}. Choose a symmetric format."
            )
        if self.activations is not None:
            if not isinstance(self.activations, str):
                raise ValueError(
                    "activations are rounded to a grid that is given by its name, "
                    f'"int8" or "e4m3", got {self.activations!r}.'
                )
            grid = named(self.activations)
            if grid.has_zero_point or not isinstance(grid, Linear | Native):
                raise ValueError(
                    f"activations are rounded to int2 ... int8, e4m3 or e5m2, got "
                    f"{self.activations!r}."
                )
        if self.range is not None and self.activations is None:
            raise ValueError(
                f"a range ({self.range!r}) is one of activations: name what they are "
                "rounded to as well, `with_activations('int8', range=...)`."
            )
        known = self.range is None or self.range in RANGES
        number = isinstance(self.range, int | float) and 0 < self.range <= 100
        number = number and not isinstance(self.range, bool)
        if not known and not number:
            raise ValueError(
                f"a range is found by one of {', '.join(RANGES)}, or is a percentile "
                f"in (0, 100], got {self.range!r}."
            )

    def grouped(self, group: int | None) -> "Format":
        """The same with a scale for each `group` weights of an output."""
        return dataclasses.replace(self, group=group)

    def tiled(self, group: int, outputs: int) -> "Format":
        """The same with a scale for each tile of `group` weights of `outputs`."""
        return dataclasses.replace(self, group=group, outputs=outputs)

    def per_tensor(self) -> "Format":
        """The same with one scale for all."""
        return dataclasses.replace(self, group=None, outputs=None)

    def with_activations(
        self, grid: str, *, range: str | float | None = None
    ) -> "Format":
        """The same with activations rounded too; see the attributes."""
        return dataclasses.replace(self, activations=grid, range=range)

    @property
    def bits(self) -> int:
        """Of a weight, without scales."""
        return self.grid.bits

    @property
    def name(self) -> str:
        """`int4`, `int4 groups of 32`, `w8a8`, `mxfp4`: for tables."""
        known = next((n for n, f in _KNOWN.items() if f == self), None)
        if known is not None:
            return known
        name = product_name(self.grid, self.activations, static=self.range is not None)
        if self.range is not None:
            name += f" ({self.range})"
        if self.outputs is None:
            name += " per tensor" if self.group is None else f" rows of {self.group}"
        elif self.outputs > 1:
            name += f" tiles of {self.group or 'all'} x {self.outputs}"
        elif self.group is not None:
            name += f" groups of {self.group}"
        return name if self.scale == "float32" else f"{name}, {self.scale} scales"

    def blocks(
        self,
        shape: Sequence[int],
        contract_dims: Sequence[int],
        batch_dims: Sequence[int] = (),
    ) -> tuple[int, ...]:
        """How many neighbours along each dim share a scale.

        A group may span several whole dims: 32 weights of the dims (4, 8, 16) are
        a block of (1, 2, 16). Along `batch_dims` nothing is shared.

        Raises:
            ValueError: groups of that size do not fill the contracted dims, or
                blocks of so many outputs not the others.
        """
        kept = {*contract_dims, *batch_dims}
        outputs = [d for d in range(len(shape)) if d not in kept]
        blocks = [1] * len(shape)
        fill_blocks(blocks, shape, sorted(contract_dims), self.group, "summed")
        fill_blocks(blocks, shape, outputs, self.outputs, "output")
        return tuple(blocks)


def product_name(grid: Grid, activations: str | None, *, static: bool = False) -> str:
    """`int4`, or `w4a8` where activations are rounded too; else `uint4 x int8`."""
    if activations is None:
        return grid.name
    other = named(activations)
    both = grid == Linear(grid.bits) and other == Linear(other.bits)
    name = f"w{grid.bits}a{other.bits}" if both else f"{grid.name} x {other.name}"
    return f"{name} static" if static else name


def fill_blocks(
    blocks: list[int],
    shape: Sequence[int],
    dims: Sequence[int],
    n: int | None,
    what: str,
) -> None:
    """Sets the blocks along those dims to hold `n` together, from the last one on.

    Args:
        blocks: changed in place.
        shape: of the weight.
        dims: of it.
        n: None for all.
        what: they are, for the error.

    Raises:
        ValueError: `n` does not fill them evenly.
    """
    left = math.prod(shape[d] for d in dims) if n is None else n
    for d in reversed(dims):
        if left % shape[d] == 0:
            blocks[d], left = shape[d], left // shape[d]
        elif shape[d] % left == 0:
            blocks[d], left = left, 1
        else:
            break
    else:
        if left == 1:
            return
    sizes = [shape[d] for d in dims]
    last = sizes[-1] if sizes else 1
    fitting = [m for m in range(2, last + 1) if last % m == 0]
    groups = f"a group among {fitting}, or " if fitting else ""
    raise ValueError(
        f"a group of {n} weights must divide the {what} dims {sizes} evenly, from the "
        f"last one on. Choose {groups}None for one scale per "
        f"{'output channel' if what == 'summed' else 'tensor'}."
    )


int8, int4 = Format(Linear(8)), Format(Linear(4))
int3, int2 = Format(Linear(3)), Format(Linear(2))
uint8 = Format(Linear(8, symmetric=False))
uint4 = Format(Linear(4, symmetric=False))
w8a8 = int8.with_activations("int8")
w4a8 = int4.with_activations("int8")
log4 = Format(Logarithmic(4))
log4_sqrt2 = Format(Logarithmic(4, per_octave=2))
fp8 = Format(floating("e4m3"))
w8a8_fp8 = fp8.with_activations("e4m3")
nf4 = Format(floating("nf4"), group=64)
mxfp8 = Format(floating("e4m3"), group=32, scale="e8m0")
mxfp6 = Format(floating("e2m3"), group=32, scale="e8m0")
mxfp4 = Format(floating("e2m1"), group=32, scale="e8m0")
nvfp4 = Format(floating("e2m1"), group=16, scale="e4m3")
bfloat16 = Format(floating("bfloat16"), outputs=None, scale="none")

_KNOWN = {
    "mxfp8": mxfp8,
    "mxfp6": mxfp6,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "bfloat16": bfloat16,
    "fp8": fp8,
}
