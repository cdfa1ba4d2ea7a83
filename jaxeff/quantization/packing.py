"""Two 4-bit integers in each byte, along one dim.

The even index lies in the low half, its odd neighbour in the high half, so that
slicing, sharding and merging dims keep whole bytes together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8


def pack(values: Int8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Integers in -8 ... 7, two to a byte; an odd length is filled with a zero."""
    axis %= values.ndim
    if values.shape[axis] % 2:
        one = [(0, int(d == axis)) for d in range(values.ndim)]
        values = jnp.pad(values, one)
    pairs = (values.shape[axis] // 2, 2)
    values = values.reshape(*values.shape[:axis], *pairs, *values.shape[axis + 1 :])
    halves = jax.lax.bitcast_convert_type(values, jnp.uint8) & 0xF
    low = jax.lax.index_in_dim(halves, 0, axis + 1, keepdims=False)
    high = jax.lax.index_in_dim(halves, 1, axis + 1, keepdims=False)
    return low | (high << 4)


def unpack(packed: UInt8[Array, "..."], axis: int, size: int) -> Int8[Array, "..."]:
    """The integers that `pack` stored, `size` of them along `axis`.

    Law: unpack(pack(x, axis), axis, x.shape[axis]) equals x.
    """
    axis %= packed.ndim
    byte = jax.lax.bitcast_convert_type(packed, jnp.int8)
    # Shifting left and back again copies the sign of the low half upwards.
    low, high = (byte << 4) >> 4, byte >> 4
    values = jnp.stack([low, high], axis + 1)
    shape = (*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
    return jax.lax.slice_in_dim(values.reshape(shape), 0, size, axis=axis)
