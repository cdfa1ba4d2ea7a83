"""Sparse weights: leaves that store what is kept, and where it stands.

Each multiplies by what `dense()` gives, decoded where it is used, so what is saved
is bytes; `block_sparse.py` has the one that saves multiplications too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from jaxeff.program import Conv, Dot, Leaf, reshape_groups
from jaxeff.tree import pytree, static

from .bits import pack_bits, unpack_bits


class Decoded(Leaf):
    """A leaf that multiplies by the array it stands for."""

    def dot(self, x: Array, dot: Dot) -> Array:
        """`dot(x, self.dense())`."""
        return dot(x, self.dense())

    def conv(self, x: Array, conv: Conv) -> Array:
        """`conv(x, self.dense())`."""
        return conv(x, self.dense())

    def take(self, gather: Callable[[Array], Array], dim: int) -> Array:
        """Rows of the array it stands for."""
        return gather(self.dense())


@pytree
class NMArray(Decoded):
    """At most `n` of each `m` neighbours along a dim, and which of the `m` they are.

    Laws: `dense()` has the stored values at their places, zeros elsewhere, bit for
    bit (a negative zero becomes zero); every view has them too.

    Attributes:
        values: as the array, but along `axis` n for each m.
        places: of the values in their groups, 8 // bits to a byte along `axis`.
        n, m: of the pattern.
        axis: negative; the array's length there is a multiple of `m`.
    """

    values: Float[Array, "..."]
    places: UInt8[Array, "..."]
    n: int = static()
    m: int = static()
    axis: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        shape = list(self.values.shape)
        shape[self.axis] = shape[self.axis] // self.n * self.m
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.values.dtype

    @property
    def format(self) -> str:
        """`2:4`: for tables."""
        return f"{self.n}:{self.m}"

    def _unpacked(self) -> tuple[Array, Array]:
        """Values and places, with the axis last."""
        values = jnp.moveaxis(self.values, self.axis, -1)
        places = jnp.moveaxis(self.places, self.axis, -1)
        return values, unpack_bits(places, _bits(self.m), values.shape[-1])

    def dense(self) -> Array:
        """The array it stands for."""
        return _nm_dense(self)

    def astype(self, dtype: Any) -> Any:
        """The same weight in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> "NMArray":
        """The same weight with its dims in another order."""
        order = [int(d) for d in permutation]
        axis = order.index(self.axis + self.ndim) - self.ndim
        values, places = (x.transpose(order) for x in (self.values, self.places))
        return NMArray(values, places, self.n, self.m, axis)

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with dims split or merged, if groups stay neighbours."""
        shape, axis = tuple(shape), self.axis + self.ndim
        groups = reshape_groups(self.shape, shape)
        olds, news = next(g for g in groups if axis in g[0])
        inner = math.prod(self.shape[d] for d in olds if d > axis)
        last = next((d for d in reversed(news) if shape[d] > 1), None)
        if inner != 1 or last is None or shape[last] % self.m:
            return NotImplemented
        small = list(shape)
        small[last] = shape[last] // self.m * self.n
        values, places = (
            jnp.moveaxis(jnp.moveaxis(x, -1, axis).reshape(small), last, -1)
            for x in self._unpacked()
        )
        return self._packed(values, places, last - len(shape))

    def _packed(self, values: Array, places: Array, axis: int) -> "NMArray":
        """The weight of values and places that have the axis last."""
        back = lambda x: jnp.moveaxis(x, -1, axis)
        places = pack_bits(places, _bits(self.m))
        return NMArray(back(values), back(places), self.n, self.m, axis)

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without the indices of `dim` where `mask` is False.

        Along the axis, if no group loses only some of its indices.
        """
        if dim - self.ndim != self.axis:
            pick = lambda x: jnp.take(x, np.flatnonzero(mask), axis=dim)
            values, places = pick(self.values), pick(self.places)
            return dataclasses.replace(self, values=values, places=places)
        whole = mask.reshape(-1, self.m)
        if (whole.any(1) != whole.all(1)).any():
            return NotImplemented
        kept = np.flatnonzero(np.repeat(whole[:, 0], self.n))
        values, places = (jnp.take(x, kept, axis=-1) for x in self._unpacked())
        return self._packed(values, places, self.axis)


# One program rather than an operation at a time, where nothing else compiles it.
@jax.jit
def _nm_dense(x: NMArray) -> Array:
    values, places = (y.reshape(*y.shape[:-1], -1, x.n, 1) for y in x._unpacked())
    shape = (*values.shape[:-1], x.m)
    number = jax.lax.broadcasted_iota(places.dtype, shape, len(shape) - 1)
    # Not a product with zeros and ones: an infinity would spoil its group.
    each = jnp.where(places == number, values, jnp.zeros([], values.dtype))
    dense = jnp.sum(each, axis=-2).reshape(*shape[:-3], -1)
    return jnp.moveaxis(dense, -1, x.axis)


def _bits(m: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


def nm_array(w: Float[Array, "..."], n: int, m: int, axis: int = -1) -> NMArray:
    """A weight that has at most n nonzeros in each m neighbours along a dim.

    Law: `nm_array(w, n, m, axis).dense()` equals `w`.

    Raises:
        ValueError: the dim is no multiple of m, or a group has more nonzeros.
    """
    axis = axis % w.ndim - w.ndim
    if not 1 <= n <= m <= 256 or w.shape[axis] % m:
        raise ValueError(
            f"groups of {m} with 1 <= n = {n} of them kept fill a dim whose length is "
            f"a multiple of {m}, got {w.shape[axis]}: choose another dim or pattern."
        )
    groups = np.moveaxis(np.asarray(w) != 0, axis, -1)
    most = int(groups.reshape(-1, m).sum(1).max(initial=0))
    if most > n:
        raise ValueError(
            f"at most {n} of each {m} neighbours may be nonzero, but a group has "
            f"{most}: prune it to {n}:{m} first."
        )
    values, places = _pick(jnp.asarray(w), n, m, axis)
    return NMArray(values, places, n, m, axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pick(w: Array, n: int, m: int, axis: int) -> tuple[Array, Array]:
    """The values and packed places of an `NMArray`."""
    groups = jnp.moveaxis(w, axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    first = jnp.argsort(groups == 0, axis=-1, stable=True)[..., :n]
    places = jnp.sort(first, axis=-1)
    values = jnp.take_along_axis(groups, places, axis=-1)
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    packed = pack_bits(flat(places), _bits(m))
    return jnp.moveaxis(flat(values), -1, axis), jnp.moveaxis(packed, -1, axis)


@pytree
class BitmaskArray(Decoded):
    """The nonzeros of an array in their order, and one bit for each element.

    Leading dims, such as the layers of a stack, are arrays of their own, each with
    room for as many values as the fullest needs.

    Law: `dense()` has the stored values where bits are set, zeros elsewhere.

    Attributes:
        values: those where bits are set, then zeros.
        mask: eight bits to a byte.
        tail: the dims that are stored together.
        order: how these are permuted in the array it stands for.
    """

    values: Float[Array, "*lead room"]
    mask: UInt8[Array, "*lead bytes"]
    tail: tuple[int, ...] = static()
    order: tuple[int, ...] = static()

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dims."""
        return tuple(self.values.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        return (*self.lead, *(self.tail[d] for d in self.order))

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.values.dtype

    @property
    def format(self) -> str:
        """What it is: for tables."""
        return "bitmask"

    def _spread(self) -> tuple[Array, Array]:
        """Values and whether they are stored: (*lead, elements)."""
        return _bitmask_spread(self)

    def _shaped(self, flat: Array) -> Array:
        n = len(self.lead)
        order = (*range(n), *(n + d for d in self.order))
        return flat.reshape(*self.lead, *self.tail).transpose(order)

    def dense(self) -> Array:
        """The array it stands for."""
        return self._shaped(self._spread()[0])

    def astype(self, dtype: Any) -> Any:
        """The same weight in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight with its dims in another order, leading ones apart."""
        n, order = len(self.lead), [int(d) for d in permutation]
        if order[:n] != list(range(n)):
            return NotImplemented
        new = tuple(self.order[d - n] for d in order[n:])
        return dataclasses.replace(self, order=new)

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with dims split or merged, leading ones apart."""
        n, plain = len(self.lead), tuple(range(len(self.tail)))
        if tuple(shape[:n]) != self.lead or self.order != plain:
            return NotImplemented
        tail = tuple(int(d) for d in shape[n:])
        return BitmaskArray(self.values, self.mask, tail, tuple(range(len(tail))))

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> "BitmaskArray":
        """The weight without the indices of `dim` where `mask` is False."""
        kept = np.flatnonzero(mask)
        if dim < len(self.lead):
            values, bits = (
                jnp.take(x, kept, axis=dim) for x in (self.values, self.mask)
            )
            return dataclasses.replace(self, values=values, mask=bits)
        values, bits = (
            jnp.take(self._shaped(x), kept, axis=dim) for x in self._spread()
        )
        return _bitmask(values, bits, len(self.lead), self.values.shape[-1])


@jax.jit
def _bitmask_spread(x: BitmaskArray) -> tuple[Array, Array]:
    bits = unpack_bits(x.mask, 1, math.prod(x.tail)) > 0
    at = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) - 1
    at = jnp.clip(at, 0, x.values.shape[-1] - 1)
    values = jnp.take_along_axis(x.values, at, axis=-1)
    return jnp.where(bits, values, jnp.zeros([], x.dtype)), bits


def bitmask_array(w: Float[Array, "..."], lead: int = 0) -> BitmaskArray:
    """The nonzeros of a weight.

    Law: `bitmask_array(w).dense()` equals `w`.

    Args:
        w: the weight.
        lead: how many leading dims are arrays of their own: those a scan slices.
    """
    w = jnp.asarray(w)
    return _bitmask(w, w != 0, lead, math.prod(w.shape[lead:]))


def _bitmask(
    w: Array, kept: Shaped[Array, "..."], lead: int, room: int
) -> BitmaskArray:
    """What is kept of `w`, in as little room as is known to do."""
    tail = tuple(w.shape[lead:])
    flat = lambda x: x.reshape(*x.shape[:lead], -1)
    w, kept = flat(w), flat(kept)
    if not isinstance(kept, jax.core.Tracer):
        room = int(jnp.max(jnp.sum(kept, axis=-1), initial=0))
    room = max(1, min(room, w.shape[-1]))
    values, mask = _store(w, kept, room)
    return BitmaskArray(values, mask, tail, tuple(range(len(tail))))


@functools.partial(jax.jit, static_argnums=2)
def _store(w: Array, kept: Array, room: int) -> tuple[Array, Array]:
    """The values and the mask of a `BitmaskArray`."""
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :room]
    values = jnp.take_along_axis(w, order, axis=-1)
    real = jnp.take_along_axis(kept, order, axis=-1)
    return jnp.where(real, values, jnp.zeros([], w.dtype)), pack_bits(kept, 1)
