"""Which of many numbers are the smallest, exactly, by counting instead of sorting.

The k smallest are those below a threshold, and the threshold is found bit by bit:
for each bit, count how many numbers lie below. A count is a sum, so arrays that are
spread over devices stay where they are and only the counts travel; and 32 counts
take less time than one sort. Among equals those that come first are taken, found in
the same way over their places.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int, Int32

Dims = tuple[int, ...]

FIRST = -(2**31)  # a key below that of every number: goes before all others
LAST = 2**31 - 1  # that of a nan: nothing goes after it
# Up to this many numbers, comparing each with each takes less time than 32 counts.
FEW = 16


def order_keys(x: Inexact[Array, "*dims"]) -> Int32[Array, "*dims"]:
    """Integers in the order of the numbers as float32; a nan is the largest.

    Law: order_keys(a) < order_keys(b) where a < b, and equal where a == b.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)  # no -0
    # Of two negative numbers the one with the larger bits is the smaller one.
    keys = jnp.where(bits < 0, bits ^ jnp.int32(LAST), bits)
    return jnp.where(jnp.isnan(x), LAST, keys)


@functools.partial(jax.jit, static_argnames="along")  # outside of jit: compile once
def smallest(
    keys: Sequence[Int32[Array, "..."]],
    counts: Sequence[Int[Array, "..."]],
    along: tuple[Dims, ...],
) -> list[Bool[Array, "..."]]:
    """True at the smallest entries of each array; of equals, those that come first.

    Law: every slice of `keys[i]` over the dims `along[i]` has exactly its count of
    True, and no False there is smaller than a True.

    Args:
        keys: of `order_keys`. All arrays are searched in one loop, so that devices
            meet once per bit and not once per bit and array.
        counts: how many to take, from 0 to the size of a slice; it broadcasts
            against its keys with the dims `along` of size 1.
        along: for each array the dims that are ranked together.
    """
    few = [_size(k, a) <= FEW and len(a) == 1 for k, a in zip(keys, along, strict=True)]
    many = [i for i, is_few in enumerate(few) if not is_few]
    rows = [_rows(k, a) for k, a in zip(keys, along, strict=True)]
    counts = [jnp.broadcast_to(c, r) for c, r in zip(counts, rows, strict=True)]
    found = _by_counting(
        [keys[i] for i in many], [counts[i] for i in many], [along[i] for i in many]
    )
    taken = dict(zip(many, found, strict=True))
    return [
        _by_comparing(keys[i], counts[i], along[i][0]) if is_few else taken[i]
        for i, is_few in enumerate(few)
    ]


@jax.jit
def shared_counts(
    keys: Sequence[Int32[Array, "..."]], sparsity: Float[Array, ""] | float
) -> list[Int32[Array, ""]]:
    """How many of each array lie among the smallest of all arrays together.

    They add up to round(sparsity * the size of all), in float32 arithmetic; of
    equals those of earlier arrays are taken.
    """
    total = jnp.round(sparsity * jnp.float32(sum(k.size for k in keys)))
    # Two halves of 16 bits: a model has more weights than an int32 counts.
    high = jnp.floor(total / 65536)
    wanted = high.astype(jnp.int32), (total - high * 65536).astype(jnp.int32)

    def bit(i, threshold):
        higher = threshold + (jnp.int32(1) << (31 - i))
        n = _sum([_count(k < higher) for k in keys])
        fits = (n[0] < wanted[0]) | ((n[0] == wanted[0]) & (n[1] <= wanted[1]))
        return jnp.where(fits, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, bit, jnp.int32(FIRST))
    below = [_count(k < threshold) for k in keys]
    n = _sum(below)
    left = jnp.minimum(wanted[0] - n[0], 32767) * 65536 + wanted[1] - n[1]
    counts = []
    for k, b in zip(keys, below, strict=True):
        equal = jnp.minimum(left, _count(k == threshold))
        left = left - equal
        counts.append(b + equal)
    return counts


def _count(x: Array, along: Dims | None = None) -> Array:
    return jnp.sum(x, axis=along, dtype=jnp.int32, keepdims=along is not None)


def _sum(counts: list[Array]) -> tuple[Array, Array]:
    """The sum of int32 counts, as multiples of 65536 and the rest."""
    n = jnp.stack(counts)
    low = jnp.sum(n & 0xFFFF)
    return jnp.sum(n >> 16) + (low >> 16), low & 0xFFFF


def _size(x: Array, along: Dims) -> int:
    return math.prod(x.shape[d] for d in along)


def _rows(x: Array, along: Dims) -> Dims:
    return tuple(1 if d in along else n for d, n in enumerate(x.shape))


def _by_comparing(keys: Array, counts: Array, dim: int) -> Array:
    keys, counts = jnp.moveaxis(keys, dim, -1), jnp.moveaxis(counts, dim, -1)
    a, b = keys[..., :, None], keys[..., None, :]
    earlier = np.tri(keys.shape[-1], k=-1, dtype=bool)
    earlier = earlier.reshape((1,) * (keys.ndim - 1) + earlier.shape)
    rank = jnp.sum((b < a) | ((b == a) & earlier), axis=-1, dtype=jnp.int32)
    return jnp.moveaxis(rank < counts, -1, dim)


def _by_counting(
    keys: list[Array], counts: list[Array], along: list[Dims]
) -> list[Array]:
    if not keys:
        return []
    each = list(range(len(keys)))

    def search(bits, test, start):
        """The largest thresholds that at most `counts` entries lie below."""

        def bit(i, thresholds):
            step = jnp.int32(1) << (bits - 1 - i)
            higher = [t + step for t in thresholds]
            fits = [_count(test(j, higher[j]), along[j]) <= counts[j] for j in each]
            return [jnp.where(fits[j], higher[j], thresholds[j]) for j in each]

        return jax.lax.fori_loop(0, bits, bit, start)

    start = [jnp.full(c.shape, FIRST, jnp.int32) for c in counts]
    value = search(32, lambda j, t: keys[j] < t, start)
    below = [keys[j] < value[j] for j in each]
    left = [counts[j] - _count(below[j], along[j]) for j in each]

    # Only where equals straddle the threshold do their places matter.
    def places():
        place = [_places(keys[j], along[j]) for j in each]
        bits = max(_size(keys[j], along[j]) for j in each).bit_length()
        chosen = lambda j, t: below[j] | ((keys[j] == value[j]) & (place[j] < t))
        limit = search(bits, chosen, [jnp.zeros_like(c) for c in counts])
        return [chosen(j, limit[j]) for j in each]

    straddle = sum(jnp.sum(n > 0, dtype=jnp.int32) for n in left) > 0
    return jax.lax.cond(straddle, places, lambda: below)


def _places(x: Array, along: Dims) -> Array:
    """Each entry's place in its slice over the dims `along`, row by row."""
    place, stride = jnp.zeros(x.shape, jnp.int32), 1
    for d in sorted(along, reverse=True):
        place += stride * jax.lax.broadcasted_iota(jnp.int32, x.shape, d)
        stride *= x.shape[d]
    return place
