"""Small integers, several to a byte, along the last dim."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8


def pack_bits(values: Array, bits: int) -> UInt8[Array, "*dims packed"]:
    """Integers below 2 ** bits, 8 / bits to a byte, the first in the lowest bits.

    Args:
        values: the last dim is filled up with zeros to whole bytes.
        bits: 1, 2, 4 or 8.
    """
    each = 8 // bits
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % each)]
    values = jnp.pad(values.astype(jnp.uint8), pad)
    values = values.reshape(*values.shape[:-1], -1, each)
    return jnp.sum(values << _shifts(values, bits), axis=-1, dtype=jnp.uint8)


def unpack_bits(
    packed: UInt8[Array, "*dims packed"], bits: int, size: int
) -> UInt8[Array, "*dims {size}"]:
    """The integers that `pack_bits` stored, `size` of them.

    Law: unpack_bits(pack_bits(x, bits), bits, x.shape[-1]) equals x.
    """
    each = 8 // bits
    wide = jnp.broadcast_to(packed[..., None], (*packed.shape, each))
    values = (wide >> _shifts(wide, bits)) & jnp.uint8(2**bits - 1)
    values = values.reshape(*packed.shape[:-1], packed.shape[-1] * each)
    return jax.lax.slice_in_dim(values, 0, size, axis=values.ndim - 1)


def _shifts(values: Array, bits: int) -> Array:
    places = jax.lax.broadcasted_iota(jnp.uint8, values.shape, values.ndim - 1)
    return places * jnp.uint8(bits)
