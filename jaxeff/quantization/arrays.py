"""A quantized array: codes and scales, standing where the array stood.

Views (transpose, reshape, slices, the rows of a look-up) stay codes; how it
multiplies is in `products.py`, how scales are found in `scales.py` and shared in
`blocks.py`, and what a code stands for is for its grid to say (`grids.py`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import Conv, Dot, Leaf, take_places
from jaxeff.tree import pytree, static

from . import blocks, forms, products, scales as scaling
from .formats import Format, product_name
from .grids import Grid, named
from .packing import pack, pack_dim, unpack
from .scales import Scales


@pytree
class QArray(Leaf):
    """An array stored as `(number - zero) * scale * outer`, a number for each code.

    All but the codes have the array's rank, and along each dim a length that divides
    the array's (see `blocks`). Codes of fewer than 8 bits lie without a gap along
    the dim `packed`.

    Attributes:
        values: the codes.
        scale: the width of one step, in the units of the array; of 8 bits, or
            float32.
        outer: what scales of 8 bits are multiplied with, if anything.
        zero: which number is the zero of its block, if the grid begins at 0.
        x_scale: of the activations, where it is known beforehand.
        grid: name of the numbers that the codes stand for.
        activations: name of the grid that activations are rounded to.

    Laws: `dense()` equals the formula above, with each scale repeated over its
    block; products are taken with exactly these numbers; every view has them too.
    """

    values: Array
    scale: Array
    outer: Float[Array, "..."] | None = None
    zero: Array | None = None
    x_scale: Float[Array, "..."] | None = None
    grid: str = static(default="int8")
    dtype_name: str = static(default="float32")
    activations: str | None = static(default=None)
    packed: int | None = static(default=None)  # negative; None: a code per element
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
    def numbers(self) -> Grid:
        """What the codes stand for."""
        return named(self.grid)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.numbers.bits

    @property
    def packed_sizes(self) -> dict[str, int]:
        """Several codes lie in a byte."""
        return {} if self.packed is None else {"values": self.size}

    @property
    def format(self) -> str:
        """What is stored and how it multiplies, `int4` or `w8a8`: for tables."""
        static = self.x_scale is not None
        return product_name(self.numbers, self.activations, static=static)

    @property
    def scales(self) -> Scales:
        """All that the codes are stretched by."""
        return Scales(self.scale, self.outer, self.zero)

    def codes(self) -> Array:
        """One to an element."""
        if self.packed is None:
            return self.values
        return self._codes(self.values, self.packed)

    def _codes(self, packed: Array, axis: int) -> Array:
        codes = unpack(packed, self.bits, axis, self.length)
        return self.numbers.from_bytes(codes)

    def units(self) -> Array:
        """The numbers of the grid, counted from their zero and not yet scaled."""
        return scaling.units(self.codes(), self.scales, self.numbers)

    def dense(self) -> Array:
        """The array it stands for."""
        return scaling.decode(self.codes(), self.scales, self.numbers).astype(
            self.dtype
        )

    def _beside(self, change: Callable[[Array], Array]) -> dict[str, Any]:
        """All that has a length for each block of a dim, changed alike."""
        names = ("scale", "outer", "zero", "x_scale")
        given = {n: getattr(self, n) for n in names}
        return {n: None if x is None else change(x) for n, x in given.items()}

    def _with(
        self, codes: Array, packed: int | None, change: Callable[[Array], Array]
    ) -> "QArray":
        values, length = codes, 0
        if packed is not None:
            length = codes.shape[packed]
            values = pack(self.numbers.to_bytes(codes), self.bits, packed)
        more = {"values": values, "packed": packed, "length": length}
        return dataclasses.replace(self, **more, **self._beside(change))

    def astype(self, dtype: Any) -> Any:
        """The same codes and scales, for products in another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def transpose(self, permutation: Sequence[int]) -> "QArray":
        """The same weight with its dims in another order."""
        packed = self.packed
        if packed is not None:
            packed = list(permutation).index(packed + self.ndim) - self.ndim
        turn = lambda x: x.transpose(permutation)
        more = {"values": turn(self.values), "packed": packed}
        return dataclasses.replace(self, **more, **self._beside(turn))

    def reshape(self, shape: Sequence[int]) -> "QArray":
        """The same weight with dims split or merged; each code gets its own byte."""
        change = lambda x: blocks.reshape(x, self.shape, tuple(shape))
        return self._with(self.codes().reshape(shape), None, change)

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> "QArray":
        """The weight without the indices of `dim` where `mask` is False."""
        kept = np.flatnonzero(mask)
        codes = jnp.take(self.codes(), kept, axis=dim, mode="clip")
        return self._with(codes, self.packed, lambda x: blocks.keep(x, dim, mask))

    def take(self, gather: Callable[[Array], Array], dim: int) -> Array:
        """Rows, looked up as codes and only then decoded."""
        at, packed = take_places(gather, self.shape, dim), self.packed
        values = self.values
        if packed is not None and packed + self.ndim == dim:
            values, packed = self.codes(), None
        rows = gather(values)
        if packed is not None:
            rows = self._codes(rows, at[packed + self.ndim])

        def beside(x: Array) -> Array:
            x = x.astype(jnp.float32)
            if x.shape[dim] > 1:
                lengths = [*x.shape[:dim], self.shape[dim], *x.shape[dim + 1 :]]
                x = gather(blocks.expand(x, lengths))
            else:
                # The ones turn NaN where an index is out of bounds, as rows would.
                ones = [n if d == dim else 1 for d, n in enumerate(self.shape)]
                x = blocks.spread(x, list(at), list(at.values()), rows.ndim)
                x = x * gather(jnp.ones(ones, jnp.float32))
            return blocks.broadcastable(x, rows.shape)

        numbers = self.numbers.decode(rows).astype(jnp.float32)
        if self.zero is not None:
            numbers = numbers - beside(self.zero)
        scale = beside(scaling.real(self.scales))
        return (numbers * scale).astype(self.dtype)

    def dot(self, x: Array, dot: Dot, rounding: Callable | None = None) -> Any:
        """`dot(x, self.dense())`, `x` rounded first where the format says so.

        Args:
            x, dot: the product.
            rounding: another `products.round_activations`.
        """
        if not _multiplies(x):
            return NotImplemented
        dtype = jnp.promote_types(x.dtype, self.dtype)
        out = dot.params["preferred_element_type"] or dtype
        x = x.astype(dtype)
        grouped = self.sums_groups(dot)
        if grouped and self.activations is None:
            # Decoding the weight beats a sum over one small product per group.
            return dot(x, self.dense().astype(dtype)).astype(out)
        if grouped:
            y = self._sum_of_groups(x, dot)
            return y if y is NotImplemented else y.astype(out)
        return products.dot(x, *self._factor(), dot, rounding).astype(out)

    def forms(self, x: Array, dot: Dot) -> dict[str, Callable[[], Any]]:
        """Other ways to multiply; see `forms.py`."""
        return forms.of(self, x, dot) if _multiplies(x) else {}

    def can_cut(self, dim: int, size: int) -> bool:
        """Whether pieces of that length cut no byte and no block under one scale."""
        count, left = divmod(self.shape[dim], size)
        packed = self.packed is not None and self.packed + self.ndim == dim
        lengths = [x.shape[dim] for x in jax.tree.leaves(self._beside(lambda x: x))]
        bytes_too = not packed or size * self.bits % 8 == 0
        return not left and bytes_too and all(n == 1 or n % count == 0 for n in lengths)

    def piece(self, dim: int, index: Any, size: int) -> "QArray":
        """One of the equal pieces that a dim can be cut into; `index` may be traced."""
        count = self.shape[dim] // size
        packed = self.packed is not None and self.packed + self.ndim == dim

        def cut(x: Array) -> Array:
            n = x.shape[dim] // count
            return jax.lax.dynamic_slice_in_dim(x, index * n, n, dim)

        beside = self._beside(lambda x: x if x.shape[dim] == 1 else cut(x))
        length = size if packed else self.length
        return dataclasses.replace(
            self, values=cut(self.values), length=length, **beside
        )

    def planes(self) -> "list[QArray]":
        """Each of the codes that share a byte as an array of its own.

        Of `n` to a byte, plane i holds every n-th index from i on of the dim they
        lie along. Empty where that is no whole number, or cuts a block of a scale.
        """
        if self.packed is None or 8 % self.bits or self.bits == 8:
            return []
        n, dim = 8 // self.bits, self.packed
        beside = jax.tree.leaves(self._beside(lambda x: x))
        if self.length % n or any(x.shape[dim] not in (1, self.length) for x in beside):
            return []

        def plane(i: int) -> QArray:
            codes = (self.values >> (self.bits * i)) & (2**self.bits - 1)
            every = (slice(i, None, n), *[slice(None)] * (-dim - 1))
            cut = lambda x: x if x.shape[dim] == 1 else x[(..., *every)]
            return dataclasses.replace(
                self,
                values=self.numbers.from_bytes(codes),
                packed=None,
                length=0,
                **self._beside(cut),
            )

        return [plane(i) for i in range(n)]

    @property
    def _lengths(self) -> tuple[int, ...]:
        """How many blocks each dim has."""
        if self.zero is None:
            return self.scale.shape
        return tuple(map(max, self.scale.shape, self.zero.shape))

    def _factor(self) -> tuple[products.Factor, products.Kind]:
        spread = lambda x: blocks.broadcastable(x, self.shape)
        w = products.Factor(
            codes=self.codes(),
            scale=spread(scaling.real(self.scales)),
            zero=None if self.zero is None else spread(self.zero),
            x_scale=self.x_scale,
        )
        return w, products.Kind(self.numbers, self._x_grid)

    @property
    def _x_grid(self) -> Grid | None:
        return None if self.activations is None else named(self.activations)

    def sums_groups(self, dot: Dot) -> bool:
        """Whether a product is a sum of one for each group of inputs."""
        return any(self._lengths[d] > 1 for d in dot.dims.w_contract)

    def _sum_of_groups(self, x: Array, dot: Dot) -> Any:
        """Each group is a product of its own, with activations rounded for it alone."""
        lengths = self._lengths
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
        if any(self._lengths[d] > 1 for d in summed):
            if self._x_grid is not None:
                x = products.rounded_input(x, self._x_grid, self.x_scale, conv)
            return conv(x, self.dense().astype(dtype)).astype(out)
        if self.activations is not None and conv.params["batch_group_count"] > 1:
            return NotImplemented
        return products.conv(x, *self._factor(), conv).astype(out)


def _multiplies(x: Array) -> bool:
    # Every 8-bit integer is exact in a floating-point type of 16 bits or more.
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 16


def quantize_array(
    w: Float[Array, "..."],
    format: Format,
    contract_dims: Sequence[int],
    batch_dims: Sequence[int] = (),
    *,
    fit: str = "absmax",
    importance: Float[Array, "..."] | None = None,
) -> QArray:
    """Rounds a weight to the nearest numbers of a format.

    Law: no number of the grid, times the scale, is nearer to the weight than the one
    taken; `dense()` then rounds to the dtype of `w`. The bound on the error that
    follows from this is stated with each grid.

    Args:
        w: the weight.
        format: its numbers, groups and activations.
        contract_dims: dims that a product sums over: they share a scale.
        batch_dims: dims that a scan slices or a look-up picks from. They do not
            share a scale, and no byte holds codes from two of their indices.
        fit, importance: how scales are found, see `scales.fit`.

    Raises:
        ValueError: groups do not fit, or no dim is left along which several codes
            could share a byte.
    """
    contract, batch = ([d % w.ndim for d in ds] for ds in (contract_dims, batch_dims))
    shared = format.blocks(w.shape, contract, batch)
    found = scaling.fit(w, format, shared, batch, method=fit, importance=importance)
    return store(w, format, found, batch)


def store(
    w: Float[Array, "..."],
    format: Format,
    scales: Scales,
    batch_dims: Sequence[int] = (),
    x_scale: Float[Array, "..."] | None = None,
) -> QArray:
    """A weight under scales that are given, each number the nearest."""
    grid = format.grid
    codes = scaling.encode(w, scales, grid)
    packed = pack_dim(w.shape, batch_dims, grid.bits) if grid.bits < 8 else None
    if packed is not None:
        codes = pack(grid.to_bytes(codes), grid.bits, packed)
    return QArray(
        values=codes,
        scale=scales.scale,
        outer=scales.outer,
        zero=scales.zero,
        x_scale=x_scale,
        grid=grid.name,
        dtype_name=jnp.dtype(w.dtype).name,
        activations=format.activations,
        packed=packed,
        length=0 if packed is None else w.shape[packed],
    )
