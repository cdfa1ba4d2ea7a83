"""Matrix products and convolutions with a quantized weight, `values * scale`.

Where the scale is the same along everything that is summed it moves to the
output: the product runs on the integers, which every floating-point type of 16
bits or more holds exactly, or, with activations rounded too, is one of integers.

Source of the integer product: Jacob et al. 2018, arXiv:1712.05877, section 2.2;
of activation scales per row, found as they arrive: Dettmers et al. 2022,
arXiv:2208.07339, section 3.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int8

from jaxeff.program import Conv, Dot, DotDims

from . import blocks

LARGEST = 127  # of an activation in 8 bits, symmetric
# Sums of more products of two such integers could overflow int32.
LONGEST_SUM = (2**31 - 1) // LARGEST**2


def round_to(
    x: Float[Array, "..."], scale: Float[Array, "..."], largest: int
) -> Int8[Array, "..."]:
    """`x / scale` to the nearest integer, ties to even. `scale` broadcasts."""
    steps = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(steps, -largest, largest).astype(jnp.int8)


def round_activations(
    x: Float[Array, "..."], shared: Sequence[int]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """`x` in 8 bits, and its scale: one for all that lies along the dims `shared`."""
    sizes = [n if d in shared else 1 for d, n in enumerate(x.shape)]
    scale = blocks.absmax_scale(x, sizes, LARGEST)
    return round_to(x, scale, LARGEST), scale


def dot(
    x: Array, values: Int8[Array, "..."], scale: Float[Array, "..."], dot: Dot
) -> Array:
    """`dot(x, values * scale)`, for a scale of length 1 along the contracted dims.

    The scale's other dims have length 1 or that of `values`.
    """
    out = _accumulate(dot.params, x)
    y = dot(x, values.astype(x.dtype), preferred_element_type=out)
    return y * _at_output(scale, dot, x.ndim)


def conv(
    x: Array, values: Int8[Array, "..."], scale: Float[Array, "..."], conv: Conv
) -> Array:
    """`conv(x, values * scale)`, for a scale that varies by output channel alone."""
    out = _accumulate(conv.params, x)
    y = conv(x, values.astype(x.dtype), preferred_element_type=out)
    return y * _by_channel(scale, conv)


def _accumulate(params: dict[str, Any], x: Array) -> Any:
    # The integers times x, not yet scaled, overflow float16 and lose bits in bfloat16.
    return jnp.promote_types(params["preferred_element_type"] or x.dtype, jnp.float32)


def integer_dot(
    x: Float[Array, "..."],
    values: Int8[Array, "..."],
    scale: Float[Array, "..."],
    dot: Dot,
) -> Array:
    """`dot`, with `x` rounded to 8 bits per row, on integers.

    A row is everything of `x` that one output sums.
    """
    out = _accumulate(dot.params, x)
    x, x_scale = round_activations(x, dot.dims.x_contract)
    y = dot(x, values, precision=None, preferred_element_type=jnp.int32)
    x_dims = (*dot.dims.x_batch, *dot.dims.x_free(x.ndim))
    at = dot.output_dims(x.ndim, values.ndim)
    x_scale = blocks.spread(x_scale, x_dims, (*at["batch"], *at["x"]), y.ndim)
    return y.astype(out) * x_scale * _at_output(scale, dot, x.ndim)


def integer_conv(
    x: Float[Array, "..."],
    values: Int8[Array, "..."],
    scale: Float[Array, "..."],
    conv: Conv,
) -> Array:
    """`conv`, with `x` rounded to 8 bits per example, on integers.

    Windows overlap and every channel meets every output, so a scale that is the
    same along all that one output sums is the same for the whole example.
    """
    others = [d for d in range(x.ndim) if d != conv.x_batch_dim]
    out = _accumulate(conv.params, x)
    x, x_scale = round_activations(x, others)
    y = conv(x, values, precision=None, preferred_element_type=jnp.int32)
    x_scale = blocks.spread(
        x_scale, [conv.x_batch_dim], [conv.output_batch_dim], y.ndim
    )
    return y.astype(out) * x_scale * _by_channel(scale, conv)


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


def straight_through(run: Callable, exact: Callable) -> Callable:
    """`run(x, values, scale)`, with the derivative of `exact` in `x` and `scale`.

    Rounding has derivative zero almost everywhere; this is the usual estimate,
    as if nothing had been rounded.

    Source: Bengio et al. 2013, arXiv:1308.3432, section 4.
    """
    fn = jax.custom_jvp(run)

    def jvp(primals, tangents):
        x, values, scale = primals
        # What does not vary is left out, or its products would be computed.
        varies = [i for i in (0, 2) if not isinstance(tangents[i], SymbolicZero)]

        def of(*moving):
            now = dict(zip(varies, moving, strict=True))
            return exact(now.get(0, x), values, now.get(2, scale))

        at, along = [primals[i] for i in varies], [tangents[i] for i in varies]
        return fn(x, values, scale), jax.jvp(of, at, along)[1]

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn


def _at_output(scale: Float[Array, "..."], dot: Dot, x_ndim: int) -> Array:
    """The scale of the weight at the dims of the output."""
    at = dot.output_dims(x_ndim, scale.ndim)
    ndim = len(at["batch"]) + len(at["x"]) + len(at["w"])
    w_dims = (*dot.dims.w_batch, *dot.dims.w_free(scale.ndim))
    return blocks.spread(scale, w_dims, (*at["batch"], *at["w"]), ndim)


def _by_channel(scale: Float[Array, "..."], conv: Conv) -> Array:
    return blocks.spread(scale, [conv.out_dim], [conv.output_channel_dim], scale.ndim)
