"""Matrix products and convolutions with a quantized weight.

Where the scale is the same along everything that is summed it moves to the
output: the product runs on the numbers of the grid, or, with activations rounded
too, on the codes of both: on integers, or on floats of 8 bits.

Source of the integer product: Jacob et al. 2018, arXiv:1712.05877, section 2.2;
of activation scales per row, found as they arrive: Dettmers et al. 2022,
arXiv:2208.07339, section 3.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxeff.program import Conv, Dot, DotDims

from . import blocks, scales as scaling
from .floating import Native
from .grids import Grid
from .linear import Linear
from .scales import Scales


class Factor(NamedTuple):
    """A quantized weight as a product sees it.

    Attributes:
        codes: one to an element.
        scale: float32, of length 1 or the weight's along each dim, and 1 along all
            dims that are summed.
        zero: of the same lengths, if the grid has one.
        x_scale: of the activations, of length 1 along all but batch dims; None: it
            is found as they arrive.
    """

    codes: Array
    scale: Float[Array, "..."]
    zero: Array | None
    x_scale: Float[Array, "..."] | None


class Kind(NamedTuple):
    """The grids of a weight and of what it meets, None if that is not rounded."""

    weight: Grid
    activations: Grid | None

    def numbers(self, w: Factor, dtype: Any) -> Array:
        """Of the weight, not scaled."""
        scales = Scales(w.scale, zero=w.zero)
        return scaling.units(w.codes, scales, self.weight).astype(dtype)

    def sums_codes(self, length: int) -> Any:
        """The dtype in which sums of so many products of codes are exact enough.

        None: the codes of the two cannot be multiplied.
        """
        w, x = self
        if isinstance(w, Linear) and isinstance(x, Linear) and w.symmetric:
            return jnp.int32 if length <= longest_sum(w, x) else None
        both = [isinstance(g, Native) and g.bits == 8 for g in self]
        return jnp.float32 if all(both) else None


def longest_sum(a: Grid, b: Grid) -> int:
    """How many products of two integers 32 bits can sum whatever they are."""
    most = [max(map(abs, (g.levels[0], g.levels[-1]))) for g in (a, b)]
    return int((2**31 - 1) // math.prod(most))


def dot(
    x: Array, w: Factor, kind: Kind, dot: Dot, rounding: Callable | None = None
) -> Array:
    """`dot(x, (numbers - zero) * scale)`, `x` rounded first if `kind` says so.

    Args:
        x, w, kind, dot: the product.
        rounding: what `round_activations` does, in another way.
    """
    rounding = rounding or round_activations
    out = _accumulate(dot.params, x)
    at = dot.output_dims(x.ndim, w.codes.ndim)
    ndim = sum(map(len, at.values()))
    w_dims = (*dot.dims.w_batch, *dot.dims.w_free(w.codes.ndim))
    x_dims = (*dot.dims.x_batch, *dot.dims.x_free(x.ndim))

    def exact(x: Array, w: Factor) -> Array:
        y = dot(x, kind.numbers(w, x.dtype), preferred_element_type=out)
        return y * blocks.spread(w.scale, w_dims, (*at["batch"], *at["w"]), ndim)

    def rounded(x: Array, w: Factor) -> Array:
        assert kind.activations is not None
        pairs = zip(dot.dims.w_batch, dot.dims.x_batch, strict=True)
        codes, x_scale = rounding(
            x, dot.dims.x_contract, kind.activations, w.x_scale, dict(pairs)
        )
        length = math.prod(x.shape[d] for d in dot.dims.x_contract)
        y = _product(dot, kind, codes, w, length).astype(out)
        y = y * blocks.spread(x_scale, x_dims, (*at["batch"], *at["x"]), ndim)
        return y * blocks.spread(w.scale, w_dims, (*at["batch"], *at["w"]), ndim)

    return exact(x, w) if kind.activations is None else _run(rounded, exact, x, w)


def conv(x: Array, w: Factor, kind: Kind, conv: Conv) -> Array:
    """The same for a convolution; the scale varies by output channel alone.

    Windows overlap and every channel meets every output, so a scale of activations
    that is the same along all that one output sums is the same for an example.
    """
    out = _accumulate(conv.params, x)
    ndim = w.codes.ndim
    at = conv.output_channel_dim

    def exact(x: Array, w: Factor) -> Array:
        y = conv(x, kind.numbers(w, x.dtype), preferred_element_type=out)
        return y * blocks.spread(w.scale, [conv.out_dim], [at], ndim)

    def rounded(x: Array, w: Factor) -> Array:
        assert kind.activations is not None
        codes, x_scale = round_activations(
            x, _not_batch(x, conv), kind.activations, w.x_scale
        )
        length = math.prod(w.codes.shape) // w.codes.shape[conv.out_dim]
        y = _product(conv, kind, codes, w, length).astype(out)
        places = [conv.x_batch_dim], [conv.output_batch_dim]
        y = y * blocks.spread(x_scale, *places, ndim)
        return y * blocks.spread(w.scale, [conv.out_dim], [at], ndim)

    return exact(x, w) if kind.activations is None else _run(rounded, exact, x, w)


def rounded_input(x: Array, grid: Grid, x_scale: Array | None, conv: Conv) -> Array:
    """What a convolution reads once its input was rounded, in the dtype of `x`.

    For weights whose scale varies within a window. Its derivative is that of `x`.
    """
    codes, scale = round_activations(x, _not_batch(x, conv), grid, x_scale)
    near = (grid.decode(codes).astype(jnp.float32) * scale).astype(x.dtype)
    return x + jax.lax.stop_gradient(near - x)


def _not_batch(x: Array, conv: Conv) -> list[int]:
    return [d for d in range(x.ndim) if d != conv.x_batch_dim]


def _product(run: Dot | Conv, kind: Kind, codes: Array, w: Factor, n: int) -> Array:
    """The product of codes where there is one, else of the numbers they stand for."""
    assert kind.activations is not None
    sums = kind.sums_codes(n)
    if sums is not None:
        return run(codes, w.codes, precision=None, preferred_element_type=sums)
    x = kind.activations.decode(codes).astype(jnp.float32)
    numbers = kind.numbers(w, jnp.float32)
    return run(x, numbers, preferred_element_type=jnp.float32)


def round_activations(
    x: Float[Array, "..."],
    shared: Sequence[int],
    grid: Grid,
    scale: Float[Array, "..."] | None = None,
    dims: dict[int, int] | None = None,
) -> tuple[Array, Float[Array, "..."]]:
    """The codes of `x`, and their scale.

    Args:
        x: activations.
        shared: dims along which a scale that is found now is the same.
        grid: of the codes.
        scale: known beforehand, with the rank of the weight; what lies beyond it is
            clipped.
        dims: the weight's dims along which that varies, and which of `x` they are.
    """
    if scale is None:
        sizes = [n if d in shared else 1 for d, n in enumerate(x.shape)]
        scale = scaling.step(blocks.absmax(x, sizes), grid.largest)
    else:
        scale = blocks.at_batch(scale, dims or {}, x.ndim)
    return grid.encode(x.astype(jnp.float32) / scale), scale


def _accumulate(params: dict[str, Any], x: Array) -> Any:
    # Numbers times x, not yet scaled, overflow float16 and lose bits in bfloat16.
    return jnp.promote_types(params["preferred_element_type"] or x.dtype, jnp.float32)


def _run(rounded: Callable, exact: Callable, x: Array, w: Factor) -> Array:
    """`rounded(x, w)`, with the derivative of `exact` in `x` and the scale.

    Rounding has derivative zero almost everywhere; this is the usual estimate,
    as if nothing had been rounded.

    Source: Bengio et al. 2013, arXiv:1308.3432, section 4.
    """
    fn = jax.custom_jvp(lambda x, scale, w: rounded(x, w._replace(scale=scale)))

    def jvp(primals, tangents):
        x, scale, w = primals
        # What does not vary is left out, or its products would be computed.
        varies = [i for i in (0, 1) if not isinstance(tangents[i], SymbolicZero)]

        def of(*moving):
            now = dict(zip(varies, moving, strict=True))
            return exact(now.get(0, x), w._replace(scale=now.get(1, scale)))

        at, along = [primals[i] for i in varies], [tangents[i] for i in varies]
        return fn(x, scale, w), jax.jvp(of, at, along)[1]

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn(x, w.scale, w._replace(scale=jnp.zeros(())))


def group_dims(
    dot: Dot, x_shape: Sequence[int], w_shape: Sequence[int], lengths: Sequence[int]
) -> tuple[list[int], list[int], Dot, int]:
    """Makes each group of contracted weights a batch dim of its own.

    Args:
        dot: the product.
        x_shape, w_shape: of its operands.
        lengths: of the weight's scale, which says how many groups each dim has.

    Returns:
        New shapes of `x` and the weight, the product of these, and how many new
        dims, in front of all others, its result is to be summed over.
    """
    contract = zip(dot.dims.x_contract, dot.dims.w_contract, strict=True)
    split = {w: x for x, w in contract if lengths[w] > 1}
    x_new, x_at = _split_dims(x_shape, {x: lengths[w] for w, x in split.items()})
    w_new, w_at = _split_dims(w_shape, {w: lengths[w] for w in split})
    dims = DotDims(
        tuple(x_at[d][-1] for d in dot.dims.x_contract),
        tuple(w_at[d][-1] for d in dot.dims.w_contract),
        (
            *(x_at[x][0] for x in split.values()),
            *(x_at[d][0] for d in dot.dims.x_batch),
        ),
        (*(w_at[w][0] for w in split), *(w_at[d][0] for d in dot.dims.w_batch)),
    )
    return x_new, w_new, dataclasses.replace(dot, dims=dims), len(split)


def _split_dims(
    shape: Sequence[int], parts: dict[int, int]
) -> tuple[list[int], list[list[int]]]:
    """The shape with some dims in two, (parts, rest), and where each dim went."""
    new, at = [], []
    for d, n in enumerate(shape):
        pieces = [parts[d], n // parts[d]] if d in parts else [n]
        at.append(list(range(len(new), len(new) + len(pieces))))
        new += pieces
    return new, at
