"""Even steps: integers, symmetric about zero or with a zero of their own.

Law: |w - dense| <= scale / 2 for a block whose scale is that of its largest
magnitude (or, with a zero point, of its range).

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .grids import Grid, parser


@dataclasses.dataclass(frozen=True)
class Linear(Grid):
    """Integers of 2 to 8 bits.

    Attributes:
        width: bits.
        symmetric: -n ... n about zero, so that negating a weight is exact; if not,
            0 ... 2**bits - 1, and each block has a zero point among them.
        narrow: without the most negative integer, -2**(bits - 1). With it, the
            largest magnitude of a block becomes half a step more than the largest
            integer, so that both ends err by half a step at most.
    """

    width: int
    _: dataclasses.KW_ONLY
    symmetric: bool = True
    narrow: bool = True

    def __post_init__(self):
        if not 2 <= self.width <= 8:
            raise ValueError(
                f"integers are stored in 2 to 8 bits, got {self.width}. Choose one of "
                "these."
            )

    @property
    def name(self) -> str:
        """`int4`; `uint4` with a zero point; `int4wide` with -8 too."""
        kind = "int" if self.symmetric else "uint"
        return f"{kind}{self.width}{'' if self.narrow else 'wide'}"

    @property
    def bits(self) -> int:
        """Of an integer."""
        return self.width

    @property
    def _ends(self) -> tuple[int, int]:
        if not self.symmetric:
            return 0, 2**self.width - 1
        half = 2 ** (self.width - 1)
        return (1 - half if self.narrow else -half), half - 1

    @property
    def levels(self) -> tuple[float, ...]:
        """The integers."""
        low, high = self._ends
        return tuple(map(float, range(low, high + 1)))

    @property
    def largest(self) -> float:
        """127 for 8 bits; 127.5 where -128 is used."""
        return self.levels[-1] + (0.0 if self.narrow else 0.5)

    @property
    def has_zero_point(self) -> bool:
        """Where it is not symmetric."""
        return not self.symmetric

    def encode(self, x: Float[Array, "..."]) -> Array:
        """int8; uint8 with a zero point. Ties go to the even integer."""
        steps = jnp.clip(jnp.round(x), *self._ends)
        return steps.astype(jnp.int8 if self.symmetric else jnp.uint8)

    def decode(self, codes: Array) -> Array:
        """int8; int16 with a zero point, so that this can be taken away."""
        return codes if self.symmetric else codes.astype(jnp.int16)

    def to_bytes(self, codes: Array) -> Array:
        """Two's complement in so many bits."""
        if not self.symmetric:
            return codes
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        return codes & (2**self.width - 1)

    def from_bytes(self, codes: Array) -> Array:
        """The integers again."""
        if not self.symmetric:
            return codes
        # Shifting left and back again copies the sign upwards.
        up = 8 - self.width
        return jax.lax.bitcast_convert_type(codes << up, jnp.int8) >> up


@parser
def _parse(name: str) -> Grid | None:
    found = re.fullmatch(r"(u?)int([2-8])(wide)?", name)
    if found is None:
        return None
    return Linear(int(found[2]), symmetric=not found[1], narrow=not found[3])
