"""A weight as codes into codebooks, multiplied by look-up where that is cheaper."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import Conv, Dot, Leaf, take_places
from jaxeff.tree import pytree, static

from . import blocks
from .codebook import Codebook
from .packing import pack, unpack


@pytree
class VectorArray(Leaf):
    """An array stored as codes into codebooks.

    Attributes:
        codes: packed along `packed`; of the array's dims, `along` divided by the
            length of a vector, and a last one for stages.
        books: (*lengths, stages, codes, dim), where lengths divide the array's dims as
            those of a scale do.
        scale: of each output, float32, or None.

    Law: `dense()` is the sum over stages of the vectors picked, times the scale;
    products are taken with exactly these numbers.
    """

    codes: Array
    books: Float[Array, "..."]
    scale: Float[Array, "..."] | None
    bits: int = static()
    dtype_name: str = static()
    along: int = static()  # negative
    packed: int | None = static()  # negative, of the codes; None: a code per byte
    length: int = static()  # of the codes along `packed`

    @property
    def stages(self) -> int:
        """Codes for each vector."""
        return self.books.shape[-3]

    @property
    def dim(self) -> int:
        """Weights of a vector."""
        return self.books.shape[-1]

    @property
    def _code_shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        if self.packed is not None:
            shape[self.packed] = self.length
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        shape = list(self._code_shape[:-1])
        shape[self.along] *= self.dim
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return jnp.dtype(self.dtype_name)

    @property
    def packed_sizes(self) -> dict[str, int]:
        """Several codes lie in a byte."""
        if self.packed is None:
            return {}
        return {"codes": math.prod(self._code_shape)}

    @property
    def format(self) -> str:
        """`codebook4`: for tables."""
        return Codebook(self.bits, dim=self.dim, stages=self.stages).name

    def plain(self) -> Array:
        """The codes, one to a byte."""
        if self.packed is None:
            return self.codes
        return unpack(self.codes, self.bits, self.packed, self.length)

    def stored(
        self, codes: Array, books: Array, scale: Array | None, packed: int | None
    ) -> "VectorArray":
        """Others in the same format.

        Args:
            codes: one to a byte.
            books, scale: for them.
            packed: the dim of codes, negative, to pack along; None: a code per byte.
        """
        length = 0
        if packed is not None:
            length = codes.shape[packed]
            codes = pack(codes, self.bits, packed)
        return dataclasses.replace(
            self,
            codes=codes,
            books=books,
            scale=scale,
            packed=packed,
            length=length,
        )

    def dense(self) -> Array:
        """The array it stands for."""
        w = decode(self.plain(), self.books, self.along)
        if self.scale is not None:
            w = w * blocks.broadcastable(self.scale, w.shape)
        return w.astype(self.dtype)

    def astype(self, dtype: Any) -> Any:
        """The same codes and codebooks, for products in another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def transpose(self, permutation: Sequence[int]) -> "VectorArray":
        """The same weight with its dims in another order."""
        n, order = self.ndim, list(permutation)
        to = lambda d: order.index(d + n) - n
        turn = lambda x, more: x.transpose([*order, *range(n, n + more)])
        return dataclasses.replace(
            self,
            codes=turn(self.codes, 1),
            books=turn(self.books, 3),
            scale=None if self.scale is None else turn(self.scale, 0),
            along=to(self.along),
            # Of the codes, whose last dim are the stages.
            packed=None if self.packed is None else to(self.packed + 1) - 1,
        )

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without the indices of `dim` where `mask` is False."""
        if dim == self.along + self.ndim and self.dim > 1:
            return NotImplemented
        kept = np.flatnonzero(mask)
        codes = jnp.take(self.plain(), kept, axis=dim, mode="clip")
        cut = lambda x: blocks.keep(x, dim, mask)
        scale = None if self.scale is None else cut(self.scale)
        return self.stored(codes, cut(self.books), scale, self.packed)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        """Rows, looked up as codes and only then decoded."""
        if dim == self.along + self.ndim or self.books.shape[dim] > 1:
            return NotImplemented
        at = take_places(gather, self.shape, dim)
        codes = self.plain()
        rows = jnp.stack([gather(codes[..., s]) for s in range(self.stages)], -1)
        ndim = rows.ndim - 1
        lengths = self.books.shape[: self.ndim]
        spread = [1] * ndim
        for d, place in at.items():
            spread[place] = lengths[d]
        order = sorted(at, key=lambda d: at[d])
        books = self.books.transpose([dim, *order, *range(self.ndim, self.ndim + 3)])
        books = books.reshape(*spread, *self.books.shape[self.ndim :])
        along = at[self.along + self.ndim] - ndim
        w = decode(rows, books, along)
        # NaN where an index is out of bounds, as rows would be.
        ones = [n if d == dim else 1 for d, n in enumerate(self.shape)]
        w = w * gather(jnp.ones(ones, jnp.float32))
        if self.scale is not None:
            lengths = [*self.scale.shape]
            lengths[dim] = self.shape[dim]
            scale = gather(blocks.expand(self.scale, lengths))
            w = w * blocks.broadcastable(scale, w.shape)
        return w.astype(self.dtype)

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())`; for few rows without the dense weight."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented
        dtype = jnp.promote_types(x.dtype, self.dtype)
        out = dot.params["preferred_element_type"] or dtype
        if self._looks_up(x, dot):
            return self._by_table(x, dot).astype(out)
        return dot(x.astype(dtype), self.dense().astype(dtype)).astype(out)

    def _looks_up(self, x: Array, dot: Dot) -> bool:
        """Whether adding up products with the codebooks takes less time."""
        d = dot.dims
        whole = d.w_contract == (self.along + self.ndim,) and not d.w_batch
        if not whole or any(n > 1 for n in self.books.shape[: self.ndim]):
            return False
        n, k = x.shape[d.x_contract[0]], self.books.shape[-2]
        rows, outs = x.size // n, self.size // n
        # A number looked up takes about as long as fifty multiplications of a product.
        table = rows * (k * self.dim + 50 * outs) * self.stages
        return table < outs * self.dim * (50 * self.stages + rows)

    def _by_table(self, x: Array, dot: Dot) -> Array:
        """Each piece of `x` times each vector of the codebooks, then sums of these."""
        (at,), n = dot.dims.x_contract, self.ndim
        pieces = jnp.moveaxis(x.astype(jnp.float32), at, -1)
        free = pieces.shape[:-1]
        pieces = pieces.reshape(-1, pieces.shape[-1] // self.dim, self.dim)
        books = self.books.reshape(self.books.shape[n:])
        codes = jnp.moveaxis(self.plain(), self.along + n, 0)
        shape = codes.shape[1:-1]
        codes = codes.reshape(codes.shape[0], -1, self.stages)

        def row(piece: Array) -> Array:
            table = jnp.einsum("jd,skd->sjk", piece, books, precision="highest")
            pick = lambda t, c: jnp.take_along_axis(t, c.astype(jnp.int32), 1).sum(0)
            return sum(
                (pick(table[s], codes[..., s]) for s in range(1, self.stages)),
                pick(table[0], codes[..., 0]),
            )

        y = jax.vmap(row)(pieces).reshape(*free, *shape)
        if self.scale is not None:
            scale = jnp.squeeze(self.scale, self.along + n)
            y = y * scale.reshape([1] * len(free) + [*scale.shape])
        if dot.weight_first:
            y = jnp.moveaxis(y, range(len(free)), range(-len(free), 0))
        return y

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())`."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented
        dtype = jnp.promote_types(x.dtype, self.dtype)
        out = conv.params["preferred_element_type"] or dtype
        return conv(x.astype(dtype), self.dense().astype(dtype)).astype(out)


def decode(codes: Array, books: Array, along: int) -> Float[Array, "..."]:
    """The sum of the vectors picked, not scaled; `along` is negative."""
    *shape, stages = codes.shape
    ndim = len(shape)
    lengths, (_, k, dim) = books.shape[:ndim], books.shape[ndim:]
    book = jnp.arange(math.prod(lengths), dtype=jnp.int32).reshape(lengths)
    book = blocks.broadcastable(book, shape)
    flat = books.reshape(-1, dim)
    total = None
    for s in range(stages):
        index = (book * stages + s) * k + codes[..., s].astype(jnp.int32)
        picked = jnp.take(flat, index, axis=0, mode="clip")
        total = picked if total is None else total + picked
    assert total is not None
    at = along + ndim
    w = jnp.moveaxis(total, -1, at + 1)
    return w.reshape(*shape[:at], shape[at] * dim, *shape[at + 1 :])
