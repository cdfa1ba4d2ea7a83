"""Number formats: how many bits a weight has, and which weights share a scale.

A format is a plain value; `arrays.quantize_array` applies it. `int8`, `int4` and
`w8a8` are the usual ones, `int4.grouped(32)` gives each run of 32 weights that
are summed together a scale of its own.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Linear:
    """Even steps, symmetric about zero: `w ≈ values * scale`, integers `values`.

    Attributes:
        bits: of a weight, 4 or 8. 8 bits hold -127 ... 127, 4 bits -7 ... 7: the
            range is symmetric, so negating a weight is exact.
        group: how many weights that are summed together share a scale, counted
            along the last of the summed dims; None: all that one output sums.
        activations: bits of what the weight is multiplied with, 8, rounded as it
            arrives with a scale per row (per example for a convolution); the
            product is then one of integers. None: activations stay as they are.
    """

    bits: int
    _: dataclasses.KW_ONLY
    group: int | None = None
    activations: int | None = None

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(
                f"weights are stored in 4 or 8 bits, got bits={self.bits}. Other "
                "widths would take the room of the next of these: choose one of them."
            )
        if self.group is not None and self.group < 1:
            raise ValueError(
                f"a group holds at least 1 weight, got group={self.group}. Leave it "
                "out for one scale per output channel."
            )
        if self.activations not in (None, 8):
            raise ValueError(
                f"activations are multiplied in 8 bits or as they are, got "
                f"activations={self.activations}. Choose 8 or None."
            )

    def grouped(self, group: int) -> "Linear":
        """The same format with a scale for each `group` weights."""
        return dataclasses.replace(self, group=group)

    @property
    def name(self) -> str:
        """`int4`, `int4 groups of 32`, `w8a8`: for tables."""
        name = f"int{self.bits}"
        if self.activations is not None:
            name = f"w{self.bits}a{self.activations}"
        return name if self.group is None else f"{name} groups of {self.group}"

    def blocks(
        self, shape: Sequence[int], contract_dims: Sequence[int]
    ) -> tuple[int, ...]:
        """How many neighbours along each dim share a scale.

        A group may span several whole dims: 32 weights of the dims (4, 8, 16) are
        a block of (1, 2, 16).

        Raises:
            ValueError: groups of that size do not fill the contracted dims.
        """
        blocks = [1] * len(shape)
        if self.group is None:
            for d in contract_dims:
                blocks[d] = shape[d]
            return tuple(blocks)
        left = self.group
        for d in sorted(contract_dims, reverse=True):
            if left % shape[d] == 0:
                blocks[d], left = shape[d], left // shape[d]
            elif shape[d] % left == 0:
                blocks[d], left = left, 1
            else:
                break
        else:
            if left == 1:
                return tuple(blocks)
        sizes = [shape[d] for d in sorted(contract_dims)]
        last = sizes[-1]
        fitting = [n for n in range(1, last + 1) if last % n == 0]
        raise ValueError(
            f"a group of {self.group} weights must divide the summed dims {sizes} "
            f"evenly, from the last one on. Choose a group among {fitting}, or None "
            "for one scale per output channel."
        )


int8 = Linear(8)
int4 = Linear(4)
w8a8 = Linear(8, activations=8)
