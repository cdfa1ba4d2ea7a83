"""Scales shared by blocks of neighbours.

A scale array has the rank of the array it belongs to, and along each dim a
length that divides the array's: 1 is one scale for the whole dim, the full
length one for each index, anything between one for each run of neighbours.
This module knows how such an array is made, expanded, reshaped and cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import reshape_groups

Shape = tuple[int, ...]


def _reduce(
    x: Float[Array, "..."], blocks: Sequence[int], reduce: Callable
) -> Float[Array, "..."]:
    """One number for each block, of `blocks[d]` neighbours along dim d."""
    shape = [m for n, b in zip(x.shape, blocks, strict=True) for m in (n // b, b)]
    return reduce(x.reshape(shape), tuple(range(1, 2 * x.ndim, 2)))


def absmax(x: Float[Array, "..."], blocks: Sequence[int]) -> Float[Array, "..."]:
    """The largest magnitude of each block, float32; NaN if one is NaN."""
    return _reduce(jnp.abs(x.astype(jnp.float32)), blocks, jnp.max)


def ends(
    x: Float[Array, "..."], blocks: Sequence[int]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The least and the largest of each block and 0, float32; NaN if one is NaN."""
    x = x.astype(jnp.float32)
    low, high = (_reduce(x, blocks, f) for f in (jnp.min, jnp.max))
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def total(x: Float[Array, "..."], blocks: Sequence[int]) -> Float[Array, "..."]:
    """The sum over each block."""
    return _reduce(x, blocks, jnp.sum)


def expand(scale: Array, shape: Sequence[int]) -> Array:
    """`scale` with each entry repeated so that dim d has length `shape[d]`."""
    for d, (n, m) in enumerate(zip(scale.shape, shape, strict=True)):
        if n != m:
            scale = jnp.repeat(scale, m // n, axis=d)
    return scale


def broadcastable(scale: Array, shape: Sequence[int]) -> Array:
    """`scale` with blocks between 1 and the whole dim expanded, 1 left as 1."""
    lengths = [1 if n == 1 else m for n, m in zip(scale.shape, shape, strict=True)]
    return expand(scale, lengths)


def reshape(scale: Array, old: Shape, new: Shape) -> Array:
    """The scale of an array of shape `old` after a reshape to `new`.

    Law: expand(reshape(scale, old, new), new) = expand(scale, old).reshape(new).
    It stays as small as blocks can say it.
    """
    lengths, target = list(scale.shape), [1] * len(new)
    for olds, news in reshape_groups(old, new):
        was, becomes = [old[d] for d in olds], [new[d] for d in news]
        block = 1  # neighbours that share a scale, counted across the dims
        for d in reversed(olds):
            block *= old[d] // lengths[d]
            if lengths[d] > 1:
                break
        while True:
            block, finer = _fit(block, was)
            fits, coarser = _fit(block, becomes)
            if fits == block:
                break
            block = fits
        for d, n in zip(olds, finer, strict=True):
            lengths[d] = n
        for d, n in zip(news, coarser, strict=True):
            target[d] = n
    return expand(scale, lengths).reshape(target)


def _fit(block: int, sizes: Sequence[int]) -> tuple[int, list[int]]:
    """The largest part of `block` that dims of those sizes can say, and how."""
    fits, lengths = 1, []
    for n in reversed(sizes):
        b = math.gcd(block, n)
        fits, lengths = fits * b, [n // b, *lengths]
        block = block // n if b == n else 1
    return fits, lengths


def keep(scale: Array, dim: int, mask: Bool[np.ndarray, " n"]) -> Array:
    """The scale of an array of which only the indices of `dim` in `mask` stay.

    Blocks that lose different numbers of indices fall apart into smaller ones.
    """
    length = scale.shape[dim]
    if length == 1:
        return scale
    left = mask.reshape(length, -1).sum(axis=1)
    block = np.gcd.reduce(left)
    kept = np.repeat(np.arange(length), left // block)
    return jnp.take(scale, kept, axis=dim, mode="clip")


def at_batch(scale: Array, dims: Mapping[int, int], ndim: int) -> Array:
    """The scale of what a weight meets, among the dims of that.

    Args:
        scale: of the weight's rank, of length 1 along all but batch dims.
        dims: the weight's batch dims, and which of `ndim` they are there.
        ndim: of what it meets.
    """
    pairs = sorted(dims.items(), key=lambda pair: pair[1])
    others = tuple(d for d in range(scale.ndim) if d not in dims)
    scale = jnp.max(scale, others, keepdims=True)
    return spread(scale, [w for w, _ in pairs], [x for _, x in pairs], ndim)


def spread(scale: Array, dims: Sequence[int], at: Sequence[int], ndim: int) -> Array:
    """`scale` with its `dims` at the places `at`, ascending, of `ndim` dims.

    Its other dims have length 1 and go.
    """
    shape = [1] * ndim
    for d, place in zip(dims, at, strict=True):
        shape[place] = scale.shape[d]
    rest = [d for d in range(scale.ndim) if d not in dims]
    return scale.transpose([*dims, *rest]).reshape(shape)
