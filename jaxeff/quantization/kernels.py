"""Pallas kernels: products with weights of 8 and 4 bits, and rounding of activations.

XLA writes a decoded weight to memory before it multiplies by it, which costs more
traffic than a dense weight. Here each tile is decoded where it is multiplied, so that
a weight is read once for each tile of rows, in the bits it is stored in: what a
product of few rows needs.

Two integers that share a byte are neighbours along one dim of the weight. The lower
and the upper halves are multiplied apart, by every second column of `x` or into every
second column of the result, so that nothing is interleaved.

Written for TPUs; on other machines `interpret=True` runs them step by step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Integer

from .scales import step

_ROWS, _COLUMNS, _INPUTS = 256, 512, 512  # of a step, at most
_NUMBERS = 2**20  # that are rounded in a step: float32, in four megabytes
_LANES = 128  # what a tile's dims are multiples of, where they do not cover all


def tile(n: int, most: int) -> int | None:
    """How long the pieces are that a dim of length n is cut into; None: it cannot be.

    Args:
        n: the length.
        most: of a piece.
    """
    if n <= most:
        return n
    fitting = (k for k in range(most, 0, -_LANES) if n % k == 0)
    return next(fitting, None)


def unfit(inputs: int, outputs: int, bits: int, packed: int | None, group: int) -> str:
    """Why `product` cannot take a weight; empty where it can.

    Args:
        inputs, outputs: of the weight.
        bits: of an integer.
        packed: the dim, 0 or 1, along which integers share bytes.
        group: inputs that share a scale.
    """
    if bits not in (4, 8) or (bits == 4) != (packed is not None):
        return f"integers of {bits} bits are no bytes or halves of them"
    dims = [inputs, outputs]
    if packed is not None:
        if dims[packed] % 2:
            return f"its {dims[packed]} integers are no pairs"
        dims[packed] //= 2
    down, across = tile(dims[0], _INPUTS), tile(dims[1], _COLUMNS)
    if down is None or across is None:
        return f"no tiles of multiples of {_LANES} fill {inputs} x {outputs}"
    if group < inputs:
        pairs = 2 if packed == 0 else 1
        if group % pairs or down % (group // pairs):
            return f"groups of {group} do not fill a tile"
    return ""


@functools.partial(jax.jit, static_argnames=("bits", "packed", "interpret"))
def product(
    x: Float[Array, "rows inputs"],
    values: Integer[Array, "..."],
    scale: Float[Array, "groups outputs"],
    *,
    bits: int,
    packed: int | None = None,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """`x @ (integers * scale)`, summed in float32.

    Args:
        x: floating point.
        values: int8 of shape (inputs, outputs); or uint8 with two integers of 4 bits,
            two's complement, the first in the lower bits, in each byte.
        scale: float32; a row for each group of neighbouring inputs.
        bits: 8 or 4.
        packed: the dim, 0 or 1, along which two integers share a byte.
        interpret: run without an accelerator.

    Returns:
        float32.
    """
    (rows, k), (groups, n) = x.shape, scale.shape
    if rows == 0:
        return jnp.zeros((0, n), jnp.float32)
    group = k // groups
    why = unfit(k, n, bits, packed, group)
    if why:
        raise ValueError(f"no kernel multiplies by this weight: {why}. Decode it.")
    tm = min(rows, _ROWS)
    m = -(-rows // tm) * tm
    x = jnp.pad(x, ((0, m - rows), (0, 0)))
    xs, scales = x[None], scale[None]
    if packed == 0:  # (input plane, half of the byte, output plane)
        planes = ((0, 0, 0), (1, 1, 0))
        xs, k, group = jnp.stack([x[:, 0::2], x[:, 1::2]]), k // 2, group // 2
    elif packed == 1:
        planes = ((0, 0, 0), (0, 1, 1))
        scales, n = jnp.stack([scale[:, 0::2], scale[:, 1::2]]), n // 2
    else:
        planes = ((0, None, 0),)
    tk, tn = tile(k, _INPUTS), tile(n, _COLUMNS)
    assert tk is not None and tn is not None
    # Of three dims, as the last two of a block must be whole or multiples of a tile.
    scales = scales[:, :, None, :]
    per_step = 1 if groups == 1 else tk // group
    group_at = (
        (lambda i, j, s: (0, 0, 0, j))
        if groups == 1
        else (lambda i, j, s: (0, s, 0, j))
    )

    def kernel(x_ref, w_ref, s_ref, out_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        codes = w_ref[...]
        for source, half, target in planes:
            w = _decode(codes, half)
            if groups > 1:
                s = s_ref[target]
                w = (w.reshape(per_step, -1, tn) * s).reshape(tk, tn)
            part = jnp.dot(
                x_ref[source],
                w.astype(x_ref.dtype),
                preferred_element_type=jnp.float32,
                precision=jax.lax.Precision.HIGHEST
                if x_ref.dtype == jnp.float32
                else None,
            )
            out_ref[target] += part
        if groups == 1:

            @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
            def _():
                for target in range(len(s_ref)):
                    out_ref[target] *= s_ref[target, 0]

    out = pl.pallas_call(
        kernel,
        grid=(m // tm, n // tn, k // tk),
        in_specs=[
            pl.BlockSpec((len(xs), tm, tk), lambda i, j, s: (0, i, s)),
            pl.BlockSpec((tk, tn), lambda i, j, s: (s, j)),
            pl.BlockSpec((len(scales), per_step, 1, tn), group_at),
        ],
        out_specs=pl.BlockSpec((len(scales), tm, tn), lambda i, j, s: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((len(scales), m, n), jnp.float32),
        interpret=interpret,
    )(xs, values, scales)
    y = out[0] if packed != 1 else out.transpose(1, 2, 0).reshape(m, 2 * n)
    return y[:rows]


def _decode(codes: Array, half: int | None) -> Array:
    """float32 numbers of int8 codes, or of the lower (0) or upper (1) four bits."""
    if half is None:
        return codes.astype(jnp.float32)
    # The sign of four bits is copied upwards by shifting left and back.
    return ((codes.astype(jnp.int32) << (28 - 4 * half)) >> 28).astype(jnp.float32)


def unfit_rows(inputs: int) -> str:
    """Why `round_rows` cannot take rows of that length; empty where it can."""
    if inputs == 0:
        return "rows without numbers have no scale"
    if 8 * inputs > _NUMBERS:
        return f"eight rows of {inputs} numbers are more than the {_NUMBERS} of a step"
    return ""


@functools.partial(jax.jit, static_argnames=("largest", "interpret"))
def round_rows(
    x: Float[Array, "rows inputs"], *, largest: int = 127, interpret: bool = False
) -> tuple[Int[Array, "rows inputs"], Float[Array, "rows 1"]]:
    """int8 codes and the scale of each row, with `x` read once.

    Law: as `products.round_activations` finds them: the scale takes the largest
    magnitude of a row to `largest`, is 1 for a row of zeros, and NaN for one that is
    not finite.

    Args:
        x: floating point; whole rows are held at a time.
        largest: integer.
        interpret: run without an accelerator.
    """
    rows, k = x.shape
    why = unfit_rows(k)
    if why:
        raise ValueError(f"no kernel rounds these rows: {why}. Leave it to XLA.")
    if rows == 0:
        return jnp.zeros((0, k), jnp.int8), jnp.zeros((0, 1), jnp.float32)
    tm = min(rows, _NUMBERS // k // 8 * 8)
    m = -(-rows // tm) * tm
    x = jnp.pad(x, ((0, m - rows), (0, 0)))

    def kernel(x_ref, codes_ref, scale_ref):
        x = x_ref[...].astype(jnp.float32)
        scale = step(jnp.max(jnp.abs(x), axis=1, keepdims=True), float(largest))
        codes = jnp.clip(jnp.round(x / scale), -largest, largest)
        codes_ref[...] = codes.astype(jnp.int8)
        scale_ref[...] = scale

    codes, scale = pl.pallas_call(
        kernel,
        grid=(m // tm,),
        in_specs=[pl.BlockSpec((tm, k), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((tm, k), lambda i: (i, 0)),
            pl.BlockSpec((tm, 1), lambda i: (i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((m, k), jnp.int8),
            jax.ShapeDtypeStruct((m, 1), jnp.float32),
        ],
        interpret=interpret,
    )(x)
    return codes[:rows], scale[:rows]
