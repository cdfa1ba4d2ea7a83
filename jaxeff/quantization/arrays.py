"""A quantized array: integers and a scale, standing where the array stood.

Views (transpose, reshape, slices, the rows of a look-up) stay integers; how it
multiplies is in `products.py`, how scales are shared in `blocks.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, UInt8

from jaxeff.program import Conv, Dot, Leaf, take_places
from jaxeff.tree import pytree, static

from . import blocks, products
from .formats import Linear
from .packing import pack, unpack


@pytree
class QArray(Leaf):
    """An array stored as `values * scale`.

    `scale` is the width of one integer step, in the units of the array. It has
    the array's rank, and along each dim a length that divides the array's (see
    `blocks`). 4-bit values lie two to a byte along the dim `packed`.

    Laws: `dense()` equals `values * scale`, with each scale repeated over its
    block; products are taken with exactly these numbers; every view has them too.
    """

    values: Int8[Array, "..."] | UInt8[Array, "..."]
    scale: Float[Array, "..."]
    bits: int = static()
    dtype_name: str = static()
    activations: int | None = static(default=None)
    packed: int | None = static(default=None)  # negative; None: a value per byte
    length: int = static(default=0)  # of the array along `packed`

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        shape = list(self.values.shape)
        if self.packed is not None:
            shape[self.packed] = self.length
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for, whatever the scale's."""
        return jnp.dtype(self.dtype_name)

    @property
    def packed_sizes(self) -> dict[str, int]:
        """Two 4-bit values lie in a byte."""
        return {} if self.packed is None else {"values": self.size}

    @property
    def format(self) -> str:
        """What is stored and how it multiplies, `int4` or `w8a8`: for tables."""
        return Linear(self.bits, activations=self.activations).name

    def integers(self) -> Int8[Array, "..."]:
        """The values, one to a byte."""
        if self.packed is None:
            return self.values
        return unpack(self.values, self.packed, self.length)

    def dense(self) -> Array:
        """The array it stands for."""
        scale = blocks.broadcastable(self.scale, self.shape)
        return (self.integers().astype(jnp.float32) * scale).astype(self.dtype)

    def _with(self, integers: Array, scale: Array, packed: int | None) -> "QArray":
        length = 0 if packed is None else integers.shape[packed]
        values = integers if packed is None else pack(integers, packed)
        return dataclasses.replace(
            self, values=values, scale=scale, packed=packed, length=length
        )

    def astype(self, dtype: Any) -> Any:
        """The same integers and scale, for products in another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def transpose(self, permutation: Sequence[int]) -> "QArray":
        """The same weight with its dims in another order."""
        packed = self.packed
        if packed is not None:
            packed = list(permutation).index(packed + self.ndim) - self.ndim
        return dataclasses.replace(
            self,
            values=self.values.transpose(permutation),
            scale=self.scale.transpose(permutation),
            packed=packed,
        )

    def reshape(self, shape: Sequence[int]) -> "QArray":
        """The same weight with dims split or merged; each value gets its own byte."""
        scale = blocks.reshape(self.scale, self.shape, tuple(shape))
        return self._with(self.integers().reshape(shape), scale, None)

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> "QArray":
        """The weight without the indices of `dim` where `mask` is False."""
        kept = np.flatnonzero(mask)
        integers = jnp.take(self.integers(), kept, axis=dim, mode="clip")
        return self._with(integers, blocks.keep(self.scale, dim, mask), self.packed)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Array:
        """Rows, looked up as integers and only then multiplied by their scales."""
        at, packed = take_places(gather, self.shape, dim), self.packed
        values, scale = self.values, self.scale
        if packed is not None and packed + self.ndim == dim:
            values, packed = self.integers(), None
        rows = gather(values)
        if packed is not None:
            rows = unpack(rows, at[packed + self.ndim], self.length)
        if scale.shape[dim] > 1:
            lengths = [*scale.shape[:dim], self.shape[dim], *scale.shape[dim + 1 :]]
            scales = gather(blocks.expand(scale, lengths))
        else:
            # The ones turn NaN where an index is out of bounds, as rows would.
            ones = [n if d == dim else 1 for d, n in enumerate(self.shape)]
            scales = blocks.spread(scale, list(at), list(at.values()), rows.ndim)
            scales = scales * gather(jnp.ones(ones, scale.dtype))
        scales = blocks.broadcastable(scales, rows.shape)
        return (rows.astype(jnp.float32) * scales).astype(self.dtype)

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())`, `x` rounded first where the format says so."""
        if not _multiplies(x):
            return NotImplemented
        dtype = jnp.promote_types(x.dtype, self.dtype)
        out = dot.params["preferred_element_type"] or dtype
        x, contract = x.astype(dtype), dot.dims.w_contract
        grouped = any(self.scale.shape[d] > 1 for d in contract)
        scale = blocks.broadcastable(self.scale, self.shape)
        if self.activations is None:
            if grouped:
                # Decoding the weight beats a sum over one small product per group.
                return dot(x, self.dense().astype(dtype)).astype(out)
            return products.dot(x, self.integers(), scale, dot).astype(out)
        if grouped:
            y = self._sum_of_groups(x, dot)
            return y if y is NotImplemented else y.astype(out)
        if math.prod(self.shape[d] for d in contract) > products.LONGEST_SUM:
            return NotImplemented
        product = products.straight_through(
            lambda x, v, s: products.integer_dot(x, v, s, dot),
            lambda x, v, s: products.dot(x, v, s, dot),
        )
        return product(x, self.integers(), scale).astype(out)

    def _sum_of_groups(self, x: Array, dot: Dot) -> Any:
        """Each group is an integer product, with activations rounded for it alone."""
        lengths = self.scale.shape
        x_shape, w_shape, inner, n = products.group_dims(
            dot, x.shape, self.shape, lengths
        )
        inner = dataclasses.replace(
            inner, params={**dot.params, "preferred_element_type": jnp.float32}
        )
        y = self.reshape(w_shape).dot(x.reshape(x_shape), inner)
        return y if y is NotImplemented else y.sum(range(n))

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())`, `x` rounded first where the format says so."""
        if not _multiplies(x):
            return NotImplemented
        dtype = jnp.promote_types(x.dtype, self.dtype)
        out = conv.params["preferred_element_type"] or dtype
        x, summed = x.astype(dtype), (*conv.spatial_dims, conv.in_dim)
        if any(self.scale.shape[d] > 1 for d in summed):
            if self.activations is not None:
                return NotImplemented
            return conv(x, self.dense().astype(dtype)).astype(out)
        scale = blocks.broadcastable(self.scale, self.shape)
        if self.activations is None:
            return products.conv(x, self.integers(), scale, conv).astype(out)
        longest = math.prod(self.shape[d] for d in summed)
        if longest > products.LONGEST_SUM or conv.params["batch_group_count"] > 1:
            return NotImplemented
        product = products.straight_through(
            lambda x, v, s: products.integer_conv(x, v, s, conv),
            lambda x, v, s: products.conv(x, v, s, conv),
        )
        return product(x, self.integers(), scale).astype(out)


def _multiplies(x: Array) -> bool:
    # Every 8-bit integer is exact in a floating-point type of 16 bits or more.
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 16


def quantize_array(
    w: Float[Array, "..."],
    format: Linear,
    contract_dims: Sequence[int],
    batch_dims: Sequence[int] = (),
) -> QArray:
    """Rounds a weight to the nearest of even steps, ties to even.

    The step of a block is its largest magnitude / 127 in 8 bits, / 7 in 4 bits, so
    that neither end of the range is clipped. A block of zeros stays zero; one with
    an infinity or NaN becomes NaN.

    Law: |values * scale - w| <= scale / 2, elementwise; `dense()` then rounds to
    the dtype of `w`.

    Args:
        w: the weight.
        format: its bits, groups and activations.
        contract_dims: dims that a product sums over: they share a scale.
        batch_dims: dims that a scan slices or a look-up picks from. They do not
            share a scale, and no byte holds values from two of their indices.

    Raises:
        ValueError: groups do not fit, or no dim is left along which two 4-bit
            values could share a byte.
    """
    contract, batch = ([d % w.ndim for d in ds] for ds in (contract_dims, batch_dims))
    largest = 2 ** (format.bits - 1) - 1
    scale = blocks.absmax_scale(w, format.blocks(w.shape, contract), largest)
    integers = products.round_to(w, blocks.broadcastable(scale, w.shape), largest)
    packed = _pack_dim(w.shape, batch) if format.bits == 4 else None
    return QArray(
        values=integers if packed is None else pack(integers, packed),
        scale=scale,
        bits=format.bits,
        dtype_name=jnp.dtype(w.dtype).name,
        activations=format.activations,
        packed=packed,
        length=0 if packed is None else w.shape[packed],
    )


def _pack_dim(shape: Sequence[int], batch: Sequence[int]) -> int:
    """The dim to lay two values to a byte along: an even one, else the longest."""
    free = [d for d in range(len(shape)) if d not in batch]
    if not free:
        raise ValueError(
            f"4-bit values lie in pairs along a dim that nothing slices, but all dims "
            f"of shape {tuple(shape)} are sliced. Choose 8 bits for this weight."
        )
    even = [d for d in free if shape[d] % 2 == 0]
    return (even[-1] if even else max(free, key=lambda d: shape[d])) - len(shape)
