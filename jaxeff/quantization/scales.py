"""The scale of each block: from its largest magnitude, or by the least error.

Sources: OCP Microscaling Formats (MX) Specification 1.0, section 6.3 (powers of
two); NVIDIA's description of nvfp4 (scales in e4m3 under one float32).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import blocks
from .formats import Format
from .grids import Grid

# Fractions of the largest magnitude that "mse" tries, down to the smallest.
_TRIED = 64
_SMALLEST = 0.2


class Scales(NamedTuple):
    """`w ≈ (number - zero) * scale * outer`, see `QArray`."""

    scale: Array
    outer: Array | None = None
    zero: Array | None = None


def fit(
    w: Float[Array, "..."],
    format: Format,
    shared: Sequence[int],
    batch: Sequence[int] = (),
    *,
    method: str = "absmax",
    importance: Float[Array, "..."] | None = None,
    outer: Float[Array, "..."] | None = None,
) -> Scales:
    """The scales of a weight.

    A block of zeros stays zero, in every format. One that holds an infinity or NaN
    has scale NaN, so that what is computed with it says so.

    Args:
        w: the weight.
        format: says what is shared, and how scales are stored.
        shared: neighbours along each dim that share a scale, of `Format.blocks`.
        batch: dims along which nothing is shared.
        method: "absmax": the largest magnitude of a block becomes the largest
            number of the grid. "mse": that or less, whichever gives the least
            squared error of the rounded weight. "hqq", for a grid with a zero point:
            that, no longer an integer, makes the error small but for a few weights.
        importance: for "mse", what each squared error is multiplied with; of a
            shape that broadcasts to the weight's.
        outer: for scales under one float32: that number, if it is known.
    """
    w = w.astype(jnp.float32)
    low, high = blocks.ends(w, shared)
    if format.scale == "none":
        return Scales(jnp.where(jnp.isfinite(low + high), 1.0, jnp.nan))
    whole = [1 if d in batch else n for d, n in enumerate(w.shape)]
    if outer is None and format.scale == "e4m3":
        outer = _outer(blocks.absmax(w, whole), format.grid)
    at = lambda part: _stored(low * part, high * part, format, outer)
    if method == "absmax":
        return at(1.0)
    if method == "hqq":
        return _half_quadratic(w, at(1.0), format, shared)
    if method != "mse":
        raise ValueError(
            f'a scale is fitted by "absmax", "mse" or "hqq", or in `quantize` by '
            f'"output", got {method!r}.'
        )
    weight = jnp.ones((1,) * w.ndim) if importance is None else importance

    def error(scales: Scales) -> Array:
        off = (apply(w, scales, format.grid) - w) ** 2 * weight
        return blocks.total(off, shared)

    # Coarse scales may be off by almost a factor of two either way.
    most = 1.0 if format.scale == "float32" else 2.0

    def better(i, best):
        least, kept = best
        new = at(most - (most - _SMALLEST) * i / (_TRIED - 1))
        now = error(new)
        # JAX selects among numbers of 8 bits by way of wider ones.
        pick = lambda a, b: jnp.where(
            now < least, a.astype(jnp.float32), b.astype(jnp.float32)
        ).astype(b.dtype)
        # `outer` follows from the whole weight, so it is the same for all.
        zero = None if kept.zero is None else pick(new.zero, kept.zero)
        chosen = Scales(pick(new.scale, kept.scale), kept.outer, zero)
        return jnp.minimum(least, now), chosen

    first = at(1.0)
    return jax.lax.fori_loop(0, _TRIED, better, (error(first), first))[1]


def method_for(format: Format, fit: str) -> str:
    """How scales of a format are found where "hqq" is asked for of several formats.

    That is for those with a zero point; the others go by the least squared error.
    """
    return "mse" if fit == "hqq" and not format.grid.has_zero_point else fit


def _half_quadratic(
    w: Float[Array, "..."], start: Scales, format: Format, shared: Sequence[int]
) -> Scales:
    """The zero points for which the sum of |error|**0.7 is small.

    The errors are split in two: those of a few weights, which a shrinking step finds
    and which are then left out, and those of the others, which the zero point makes
    zero in the mean. (Errors are counted in steps, so that it does not depend on the
    size of the weights.)

    Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
    Models", section 2 (mobiusml.github.io/hqq_blog).
    """
    grid = format.grid
    if start.zero is None:
        raise ValueError(
            f'"hqq" moves zero points, and {grid.name} has none: choose `uint4` or '
            'another asymmetric format, or "mse".'
        )
    power, beta, growth = 0.7, 10.0, 1.01
    scale = blocks.broadcastable(start.scale, w.shape)
    x, size = w / scale, math.prod(shared)

    def off(zero: Array) -> tuple[Array, Array]:
        z = blocks.broadcastable(zero, w.shape)
        codes = grid.decode(grid.encode(x + z)).astype(jnp.float32)
        return codes, x - (codes - z)

    def total(zero: Array) -> Array:
        return blocks.total(jnp.abs(off(zero)[1]) ** power, shared)

    def step(i, carry):
        zero, least, best = carry
        codes, error = off(zero)
        # The proximal step of |.|**power, to first order.
        room = (jnp.abs(error) + 1e-8) ** (power - 1) / (beta * growth**i)
        few = jnp.sign(error) * jnp.maximum(jnp.abs(error) - room, 0)
        zero = blocks.total(codes - (x - few), shared) / size
        now = total(zero)
        best = jnp.where(now < least, zero, best)
        return zero, jnp.minimum(least, now), best

    zero = start.zero.astype(jnp.float32)
    _, _, best = jax.lax.fori_loop(0, 20, step, (zero, total(zero), zero))
    return Scales(start.scale, zero=best.astype(jnp.float16))


_E4M3 = jnp.finfo(jnp.float8_e4m3fn)


def _outer(largest: Array, grid: Grid) -> Array:
    """The number for the whole weight under which scales of e4m3 reach far enough."""
    return step(largest, grid.largest * float(_E4M3.max))


def _stored(low: Array, high: Array, format: Format, outer: Array | None) -> Scales:
    """The scales with which blocks of those ends just fit the grid.

    Args:
        low, high: of each block, at most 0 and at least 0.
        format: of which the grid and the kind of scale count.
        outer: for scales under one float32: that number.
    """
    grid = format.grid
    absmax = jnp.maximum(-low, high)
    if grid.has_zero_point:
        steps = grid.levels[-1]
        scale = step(high - low, steps)
        zero = jnp.clip(jnp.round(-low / scale), 0, steps)
        return Scales(scale, zero=jnp.nan_to_num(zero).astype(jnp.uint8))
    if format.scale == "float32":
        scale = step(absmax, grid.largest)
        if 0.0 not in grid.levels:  # then nothing but the scale can make a zero
            least = jnp.finfo(jnp.float32).tiny
            scale = jnp.where(absmax == 0, least, scale)
        return Scales(scale)
    if format.scale == "e8m0":
        # frexp's fraction is in [0.5, 1), so this is the floor of the logarithm.
        exponent = jnp.frexp(absmax)[1] - 1 - int(math.floor(math.log2(grid.largest)))
        scale = jnp.exp2(jnp.clip(exponent, -126, 127).astype(jnp.float32))
        scale = jnp.where(absmax > 0, scale, 1)
        scale = jnp.where(jnp.isfinite(absmax), scale, jnp.nan)
        return Scales(scale.astype(jnp.float8_e8m0fnu))
    assert outer is not None
    inner = absmax / grid.largest / blocks.expand(outer, absmax.shape)
    # Not 0 where there are weights: the smallest number of e4m3 instead.
    inner = jnp.clip(inner, float(_E4M3.smallest_subnormal), float(_E4M3.max))
    return Scales(jnp.where(absmax == 0, 1, inner).astype(jnp.float8_e4m3fn), outer)


def step(width: Float[Array, "..."], n: float | Array) -> Float[Array, "..."]:
    """`width / n` as one can divide by it: 1 for 0, NaN for what is not finite."""
    # Not below the smallest normal number: a subnormal step is itself rounded.
    found = jnp.maximum(width / n, jnp.finfo(jnp.float32).tiny)
    return jnp.where(jnp.isfinite(width), jnp.where(width == 0, 1, found), jnp.nan)


def real(scales: Scales) -> Float[Array, "..."]:
    """The scales as float32 numbers, of the shape of `scale`."""
    scale = scales.scale.astype(jnp.float32)
    if scales.outer is None:
        return scale
    return scale * blocks.expand(scales.outer, scale.shape)


def encode(w: Float[Array, "..."], scales: Scales, grid: Grid) -> Array:
    """The codes of a weight under those scales."""
    scale = blocks.broadcastable(real(scales), w.shape)
    units = w.astype(jnp.float32) / scale
    if scales.zero is not None:
        units = units + blocks.broadcastable(scales.zero, w.shape).astype(jnp.float32)
    return grid.encode(units)


def apply(w: Float[Array, "..."], scales: Scales, grid: Grid) -> Float[Array, "..."]:
    """The weight as its codes stand for it, float32."""
    return decode(encode(w, scales, grid), scales, grid)


def units(codes: Array, scales: Scales, grid: Grid) -> Array:
    """The numbers of the grid, counted from their zero."""
    numbers = grid.decode(codes)
    if scales.zero is None:
        return numbers
    zero = blocks.broadcastable(scales.zero, codes.shape)
    if jnp.issubdtype(zero.dtype, jnp.integer):
        return numbers - zero.astype(jnp.int16)
    return numbers.astype(jnp.float32) - zero.astype(jnp.float32)


def decode(codes: Array, scales: Scales, grid: Grid) -> Float[Array, "..."]:
    """What the codes stand for, float32."""
    scale = blocks.broadcastable(real(scales), codes.shape)
    return units(codes, scales, grid).astype(jnp.float32) * scale
