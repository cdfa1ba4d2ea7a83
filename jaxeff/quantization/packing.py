"""Codes of fewer than eight bits, without a gap, along one dim of bytes.

As few codes as fill whole bytes lie together: two of 4 bits in one byte, four of 2
bits, eight of 3 bits in three. The first lies in the lowest bits. So slicing,
sharding and merging dims keep whole bytes together, and a leading dim can be
sliced without knowing anything of this.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8


def run(bits: int) -> tuple[int, int]:
    """How many codes of so many bits lie together, and in how many bytes."""
    both = math.lcm(8, bits)
    return both // bits, both // 8


def packed_size(n: int, bits: int) -> int:
    """Bytes that `n` codes take: a last, incomplete run is filled with zeros."""
    codes, n_bytes = run(bits)
    return -(-n // codes) * n_bytes


def pack_dim(shape: Sequence[int], batch: Sequence[int], bits: int) -> int:
    """The dim to lay codes along without a gap: the last that wastes least.

    Args:
        shape: of the codes.
        batch: dims that are sliced, where codes of two slices cannot share a byte.
        bits: of a code.

    Raises:
        ValueError: all dims are sliced.
    """
    free = [d for d in range(len(shape)) if d not in batch]
    if not free:
        raise ValueError(
            f"{bits}-bit codes share bytes along a dim that nothing slices, but all "
            f"dims of shape {tuple(shape)} are sliced. Choose 8 bits for this weight."
        )
    codes, n_bytes = run(bits)
    waste = lambda d: packed_size(shape[d], bits) * codes / n_bytes / shape[d]
    return min(reversed(free), key=waste) - len(shape)


def pack(codes: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    """Codes below 2**bits, packed along `axis`."""
    axis %= codes.ndim
    per_run, n_bytes = run(bits)
    missing = -codes.shape[axis] % per_run
    if missing:
        pad = [(0, missing if d == axis else 0) for d in range(codes.ndim)]
        codes = jnp.pad(codes, pad)
    parts = _split(codes, axis, per_run)
    return _join([_gather(parts, j, bits, 8) for j in range(n_bytes)], axis)


def unpack(
    packed: UInt8[Array, "..."], bits: int, axis: int, size: int
) -> UInt8[Array, "..."]:
    """The codes that `pack` stored, `size` of them along `axis`.

    Law: unpack(pack(x, bits, axis), bits, axis, x.shape[axis]) equals x.
    """
    axis %= packed.ndim
    per_run, n_bytes = run(bits)
    parts = _split(packed, axis, n_bytes)
    codes = _join([_gather(parts, i, 8, bits) for i in range(per_run)], axis)
    return jax.lax.slice_in_dim(codes, 0, size, axis=axis)


def _gather(parts: list[Array], i: int, old: int, new: int) -> Array:
    """Number i of `new` bits from neighbours of `old` bits each."""
    found = None
    for j, part in enumerate(parts):
        shift = j * old - i * new  # where its lowest bit goes
        if not -old < shift < new:
            continue
        part = part << shift if shift > 0 else part >> -shift if shift < 0 else part
        found = part if found is None else found | part
    assert found is not None
    return found if new == 8 else found & (2**new - 1)


def _split(x: Array, axis: int, n: int) -> list[Array]:
    """Every n-th index along an axis, from each of the first n on."""
    runs = (*x.shape[:axis], x.shape[axis] // n, n, *x.shape[axis + 1 :])
    x = x.reshape(runs)
    return [jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(n)]


def _join(parts: list[Array], axis: int) -> Array:
    shape = parts[0].shape
    n = len(parts) * shape[axis]
    return jnp.stack(parts, axis + 1).reshape(*shape[:axis], n, *shape[axis + 1 :])
