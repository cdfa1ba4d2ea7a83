"""Small floating-point numbers, and a table made for normal weights.

e4m3 has 4 bits of exponent and 3 of the fraction. Those of 8 bits are dtypes that
hardware multiplies; of 6 and 4 bits they are codes.

Law: from the smallest normal number to the largest the error is at most 2**-(m + 1)
of |w|, with m bits of fraction; below, half of the smallest step. What is larger
than the largest becomes it.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3, e5m2); OCP Microscaling
Formats (MX) Specification 1.0, section 5.3 (the others); Dettmers et al. 2023,
arXiv:2305.14314, section 3 and appendix E (nf4).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .grids import Grid, Magnitudes, parser, Table

_NATIVE = {
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
    "bfloat16": jnp.bfloat16,
}
# bits of the exponent, its offset, bits of the fraction; none has infinities or NaN.
_SMALL = {"e3m2": (3, 3, 2), "e2m3": (2, 1, 3), "e2m1": (2, 1, 1)}
# Quantiles of the normal distribution, with an exact zero (appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Native(Grid):
    """e4m3, e5m2 or bfloat16, stored as the dtype of that name."""

    kind: str

    @property
    def name(self) -> str:
        """Its own."""
        return self.kind

    @property
    def bits(self) -> int:
        """8 or 16."""
        return jnp.finfo(_NATIVE[self.kind]).bits

    @property
    def levels(self) -> tuple[float, ...]:
        """The finite numbers."""
        unsigned = f"uint{self.bits}"
        codes = np.arange(2**self.bits).astype(unsigned)
        numbers = codes.view(_NATIVE[self.kind]).astype(np.float32)
        return tuple(np.unique(numbers[np.isfinite(numbers)]).tolist())

    @property
    def largest(self) -> float:
        """448 for e4m3, 57344 for e5m2."""
        return float(jnp.finfo(_NATIVE[self.kind]).max)

    def encode(self, x: Float[Array, "..."]) -> Array:
        """The dtype itself."""
        return jnp.clip(x, -self.largest, self.largest).astype(_NATIVE[self.kind])

    def decode(self, codes: Array) -> Array:
        """float32."""
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Small(Magnitudes):
    """e3m2, e2m3 or e2m1, as codes of 6 and 4 bits."""

    kind: str

    @property
    def name(self) -> str:
        """Its own."""
        return self.kind

    @property
    def bits(self) -> int:
        """6 or 4."""
        exponent, _, fraction = _SMALL[self.kind]
        return 1 + exponent + fraction

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """By exponent and fraction; exponent 0 means numbers without a leading 1."""
        n, offset, m = _SMALL[self.kind]
        return tuple(
            (int(e > 0) + f / 2**m) * 2.0 ** (max(e, 1) - offset)
            for e in range(2**n)
            for f in range(2**m)
        )


@dataclasses.dataclass(frozen=True)
class NormalFloat(Table):
    """nf4: sixteen numbers, as many normal weights near each."""

    @property
    def name(self) -> str:
        """`nf4`."""
        return "nf4"

    @property
    def levels(self) -> tuple[float, ...]:
        """Of the paper's appendix E."""
        return _NF4


def floating(kind: str) -> Grid:
    """The floating-point grid of that name.

    Args:
        kind: "e4m3", "e5m2", "bfloat16", "e3m2", "e2m3", "e2m1" or "nf4".
    """
    found = _parse(kind)
    if found is None:
        known = ", ".join([*_NATIVE, *_SMALL, "nf4"])
        raise ValueError(f"there is no format {kind!r}. Choose of: {known}.")
    return found


@parser
def _parse(name: str) -> Grid | None:
    if name in _NATIVE:
        return Native(name)
    if name in _SMALL:
        return Small(name)
    return NormalFloat() if name == "nf4" else None
