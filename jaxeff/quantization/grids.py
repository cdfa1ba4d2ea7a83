"""Grids: the numbers that a few bits can stand for, before a scale stretches them.

Each number format defines one: `linear.py` even steps, `logarithmic.py` powers,
`floating.py` small floating-point numbers and tables. A grid is a plain value with
a name, from which `named` makes it again, so a checkpoint can hold it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Grid(abc.ABC):
    """Numbers, each with a code of `bits` bits.

    Law: `decode(encode(x))` is a number of the grid that no other is nearer to `x`
    than; what lies beyond an end becomes that end.
    """

    parsers: ClassVar[list[Callable[[str], "Grid | None"]]] = []

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """`int4`, `e4m3`: for tables and checkpoints."""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    @abc.abstractmethod
    def levels(self) -> tuple[float, ...]:
        """Every number, ascending."""

    @property
    def largest(self) -> float:
        """What the largest magnitude of a block is scaled to."""
        return self.levels[-1]

    @property
    def has_zero_point(self) -> bool:
        """Whether they begin at 0, and a block says which of them is its zero."""
        return False

    @abc.abstractmethod
    def encode(self, x: Float[Array, "..."]) -> Array:
        """The code of the nearest number: int8, or uint8, or a dtype of its own."""

    @abc.abstractmethod
    def decode(self, codes: Array) -> Array:
        """The numbers: float32, or int8 and int16 where they are integers."""

    def to_bytes(self, codes: Array) -> Array:
        """The codes as uint8 below 2**bits, to be packed."""
        return codes

    def from_bytes(self, codes: Array) -> Array:
        """What `to_bytes` was given."""
        return codes

    def nearest(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest number of the grid."""
        return self.decode(self.encode(x)).astype(jnp.float32)


def named(name: str) -> Grid:
    """The grid of that name.

    Raises:
        ValueError: there is none.
    """
    for parse in Grid.parsers:
        found = parse(name)
        if found is not None:
            return found
    raise ValueError(
        f"there is no number format {name!r}: int2 to int8, uint2 to uint8, log2 to "
        "log8, e4m3, e5m2, e3m2, e2m3, e2m1, nf4, and dynamic4 and dynamic8 are."
    )


def parser(parse: Callable[[str], Grid | None]) -> Callable[[str], Grid | None]:
    """Makes the grids of a file known by their names."""
    Grid.parsers.append(parse)
    return parse


@dataclasses.dataclass(frozen=True)
class Magnitudes(Grid):
    """A grid of a sign and a magnitude, of which `magnitudes` has the values.

    The highest bit of a code is the sign, the others count the magnitudes from 0.
    Ties go to the even one.
    """

    @property
    @abc.abstractmethod
    def magnitudes(self) -> tuple[float, ...]:
        """2**(bits - 1) of them, ascending, the first 0."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Every number, ascending; 0 once."""
        positive = self.magnitudes[1:]
        return (*(-x for x in positive[::-1]), 0.0, *positive)

    def encode(self, x: Float[Array, "..."]) -> Array:
        """uint8."""
        code = nearest_index(jnp.abs(x), self.magnitudes)
        sign = (x < 0) & (code > 0)  # there is one zero
        return code | (sign.astype(jnp.uint8) << (self.bits - 1))

    def decode(self, codes: Array) -> Array:
        """float32."""
        return look_up(codes, (*self.magnitudes, *(-x for x in self.magnitudes)))


@dataclasses.dataclass(frozen=True)
class Table(Grid):
    """A grid of any numbers, coded in their order."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return (len(self.levels) - 1).bit_length()

    def encode(self, x: Float[Array, "..."]) -> Array:
        """uint8."""
        return nearest_index(x, self.levels)

    def decode(self, codes: Array) -> Array:
        """float32."""
        return look_up(codes, self.levels)


def nearest_index(x: Float[Array, "..."], levels: tuple[float, ...]) -> Array:
    """Index of the nearest of ascending levels, uint8; of two the even index."""
    ends = np.asarray(levels, np.float64)
    middle = ((ends[:-1] + ends[1:]) / 2).astype(np.float32)
    # `x > middle` leaves a tie with the lower index; above an odd one it goes up.
    up = np.arange(len(middle)) % 2 == 1
    middle = np.where(up, np.nextafter(middle, np.float32(-np.inf)), middle)
    # Comparisons fuse into what comes next; a search by halves would not.
    over = [(x > m).astype(jnp.uint8) for m in middle]
    return sum(over[1:], over[0]) if len(over) <= 16 else _search(x, middle)


def _search(x: Array, middle: np.ndarray) -> Array:
    return jnp.searchsorted(jnp.asarray(middle), x, side="left").astype(jnp.uint8)


def neighbours(
    x: Float[Array, "..."], grid: Grid
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The numbers of a grid below and above; beyond an end the last two."""
    levels = jnp.asarray(grid.levels, jnp.float32)
    at = jnp.clip(jnp.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 2)
    return levels[at], levels[at + 1]


def look_up(codes: Array, table: tuple[float, ...]) -> Float[Array, "..."]:
    """The numbers of a table at those codes, float32."""
    return jnp.take(jnp.asarray(table, jnp.float32), codes, mode="clip")
