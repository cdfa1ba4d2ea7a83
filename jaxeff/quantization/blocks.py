"""Scales shared by blocks of neighbours.

A scale array has the rank of the array it belongs to, and along each dim a
length that divides the array's: 1 is one scale for the whole dim, the full
length one for each index, anything between one for each run of neighbours.
This module knows how such an array is made, expanded, reshaped and cut.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import reshape_groups

Shape = tuple[int, ...]


def absmax_scale(
    x: Float[Array, "..."], blocks: Sequence[int], largest: int
) -> Float[Array, "..."]:
    """The step with which each block of `x` just fits -largest ... largest.

    A block of zeros has step 1. A block that holds an infinity or NaN has step
    NaN, so that what is computed with it says so.

    Args:
        x: to be rounded.
        blocks: how many neighbours along each dim share a step.
        largest: integer that the largest magnitude of a block becomes.
    """
    shape = [m for n, b in zip(x.shape, blocks, strict=True) for m in (n // b, b)]
    within = tuple(range(1, 2 * x.ndim, 2))
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)).reshape(shape), axis=within)
    # Not below the smallest normal number: a subnormal step is itself rounded.
    step = jnp.maximum(absmax / largest, jnp.finfo(jnp.float32).tiny)
    step = jnp.where(absmax > 0, step, 1)
    return jnp.where(jnp.isfinite(absmax), step, jnp.nan)


def expand(scale: Float[Array, "..."], shape: Sequence[int]) -> Float[Array, "..."]:
    """`scale` with each entry repeated so that dim d has length `shape[d]`."""
    for d, (n, m) in enumerate(zip(scale.shape, shape, strict=True)):
        if n != m:
            scale = jnp.repeat(scale, m // n, axis=d)
    return scale


def broadcastable(
    scale: Float[Array, "..."], shape: Sequence[int]
) -> Float[Array, "..."]:
    """`scale` with blocks between 1 and the whole dim expanded, 1 left as 1."""
    lengths = [1 if n == 1 else m for n, m in zip(scale.shape, shape, strict=True)]
    return expand(scale, lengths)


def reshape(scale: Float[Array, "..."], old: Shape, new: Shape) -> Float[Array, "..."]:
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


def keep(
    scale: Float[Array, "..."], dim: int, mask: Bool[np.ndarray, " n"]
) -> Float[Array, "..."]:
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


def spread(
    scale: Float[Array, "..."], dims: Sequence[int], at: Sequence[int], ndim: int
) -> Float[Array, "..."]:
    """`scale` with its `dims` at the places `at`, ascending, of `ndim` dims.

    Its other dims have length 1 and go.
    """
    shape = [1] * ndim
    for d, place in zip(dims, at, strict=True):
        shape[place] = scale.shape[d]
    rest = [d for d in range(scale.ndim) if d not in dims]
    return scale.transpose([*dims, *rest]).reshape(shape)
