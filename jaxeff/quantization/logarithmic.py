"""Powers of a base, with zero and sign: fine near zero, coarse at the ends.

With base 2 a product is a shift of the other factor's exponent, on hardware that is
built for it; processors multiply, and decode by writing the exponent's bits.

Law: where |w| >= scale * base**-n, n = 2**(bits - 1) - 2, the error is at most
(base - 1) / (base + 1) of |w|; below, half of that smallest power.

Source: Miyashita et al. 2016, arXiv:1603.01025, section 3; finer bases: Lee et al.
2017 (LogNet), section 3.2.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .grids import Magnitudes, parser


@dataclasses.dataclass(frozen=True)
class Logarithmic(Magnitudes):
    """0 and the powers 1, 1/base, 1/base**2 ... of either sign.

    Attributes:
        width: bits, 2 to 8.
        per_octave: steps from one power of two to the next: the base is
            2**(1 / per_octave), so 2 for 1 and the root of 2 for 2.
    """

    width: int
    _: dataclasses.KW_ONLY
    per_octave: int = 1

    def __post_init__(self):
        if not 2 <= self.width <= 8 or self.per_octave < 1:
            raise ValueError(
                f"powers are stored in 2 to 8 bits, with 1 step or more per power of "
                f"two, got {self.width} bits and {self.per_octave} steps."
            )
        if (2 ** (self.width - 1) - 2) / self.per_octave > 120:
            raise ValueError(
                f"{self.width} bits with {self.per_octave} steps per power of two "
                "reach below the smallest float32. Choose fewer bits or more steps."
            )

    @property
    def name(self) -> str:
        """`log4`; `log4/2` with two steps per power of two."""
        finer = "" if self.per_octave == 1 else f"/{self.per_octave}"
        return f"log{self.width}{finer}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.width

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """0, then the powers up to 1."""
        n = 2 ** (self.width - 1) - 1
        return (0.0, *(2.0 ** ((i - n + 1) / self.per_octave) for i in range(n)))

    def decode(self, codes: Array) -> Array:
        """float32; powers of two by their bits, without a table."""
        if self.per_octave > 1:
            return super().decode(codes)
        n = 2 ** (self.width - 1) - 1
        code = codes.astype(jnp.int32)
        magnitude, sign = code & n, code >> (self.width - 1)
        # float32 has 8 bits of exponent, offset by 127, above 23 of the fraction.
        exponent = jnp.where(magnitude > 0, magnitude - n + 127, 0)
        bits = (exponent << 23) | (sign << 31)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@parser
def _parse(name: str) -> Logarithmic | None:
    found = re.fullmatch(r"log([2-8])(?:/(\d+))?", name)
    if found is None:
        return None
    return Logarithmic(int(found[1]), per_octave=int(found[2] or 1))
