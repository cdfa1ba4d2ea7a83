"""Codebooks: a code for one weight or several neighbours, learned from the weights.

Each code picks one of 2**bits vectors of `dim` weights; with several stages the
vectors they pick add up, each stage learned from what those before it left.

Law: with codebooks given, each code picks the vector nearest to what the stages
before it left. The distance is what k-means left, and has no bound of its own.

Sources: Gong et al. 2014, arXiv:1412.6115 (k-means, product and residual codebooks);
Han et al. 2015, arXiv:1510.00149, section 3 (weights that share values).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import Conv, Dot, Leaf, take_places
from jaxeff.tree import pytree, static

from . import blocks
from .formats import fill_blocks
from .kmeans import kmeans, nearest
from .packing import pack, packed_size, run, unpack


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A format: codes into codebooks that are learned from the weight.

    Attributes:
        bits: of a code, 1 to 8.
        dim: how many weights one code stands for: neighbours along the last of the
            dims that are summed.
        stages: codes for each vector, whose vectors add up.
        outputs: how many neighbouring outputs share codebooks; None: all.
        scaled: whether each output has a float32 scale, so that codebooks hold the
            shape of its weights and not their size.
        steps: of k-means.
    """

    bits: int
    _: dataclasses.KW_ONLY
    dim: int = 1
    stages: int = 1
    outputs: int | None = None
    scaled: bool = True
    steps: int = 30

    activations = None  # they stay as they are
    range = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8 or min(self.dim, self.stages, self.steps) < 1:
            raise ValueError(
                f"codes have 1 to 8 bits, for 1 weight or more in 1 stage or more, got "
                f"bits={self.bits}, dim={self.dim}, stages={self.stages}, "
                f"steps={self.steps}."
            )

    @property
    def group(self) -> int | None:
        """Weights that are coded together; None: each alone."""
        return self.dim if self.dim > 1 else None

    @property
    def name(self) -> str:
        """`codebook4`, `codebook8x4`: bits and weights of a code, then stages."""
        name = f"codebook{self.bits}" + (f"x{self.dim}" if self.dim > 1 else "")
        return name + (f" in {self.stages} stages" if self.stages > 1 else "")

    def vector_dim(self, shape: Sequence[int], contract_dims: Sequence[int]) -> int:
        """The dim along which neighbours are coded together.

        Raises:
            ValueError: there is none that `dim` divides.
        """
        last = max(contract_dims)
        if shape[last] % self.dim:
            fitting = [n for n in range(1, shape[last] + 1) if shape[last] % n == 0]
            raise ValueError(
                f"a code stands for {self.dim} weights along the last summed dim, of "
                f"length {shape[last]}: choose a dim among {fitting}."
            )
        return last

    def blocks(
        self,
        shape: Sequence[int],
        contract_dims: Sequence[int],
        batch_dims: Sequence[int] = (),
    ) -> tuple[int, ...]:
        """How many neighbours along each dim share codebooks.

        Raises:
            ValueError: blocks of so many outputs, or codes of so many weights, do
                not fit.
        """
        self.vector_dim(shape, contract_dims)
        kept = {*contract_dims, *batch_dims}
        sizes = [shape[d] if d in contract_dims else 1 for d in range(len(shape))]
        outputs = [d for d in range(len(shape)) if d not in kept]
        fill_blocks(sizes, shape, outputs, self.outputs, "output")
        return tuple(sizes)


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

    def _plain(self) -> Array:
        """The codes, one to a byte."""
        if self.packed is None:
            return self.codes
        return unpack(self.codes, self.bits, self.packed, self.length)

    def dense(self) -> Array:
        """The array it stands for."""
        w = _decode(self._plain(), self.books, self.along)
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
        codes = jnp.take(self._plain(), kept, axis=dim, mode="clip")
        cut = lambda x: blocks.keep(x, dim, mask)
        scale = None if self.scale is None else cut(self.scale)
        return _stored(codes, cut(self.books), scale, self)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        """Rows, looked up as codes and only then decoded."""
        if dim == self.along + self.ndim or self.books.shape[dim] > 1:
            return NotImplemented
        at = take_places(gather, self.shape, dim)
        codes = self._plain()
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
        w = _decode(rows, books, along)
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
        codes = jnp.moveaxis(self._plain(), self.along + n, 0)
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


def _decode(codes: Array, books: Array, along: int) -> Float[Array, "..."]:
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


def learn(
    w: Float[Array, "..."],
    format: Codebook,
    contract_dims: Sequence[int],
    batch_dims: Sequence[int] = (),
    *,
    importance: Float[Array, "..."] | None = None,
) -> VectorArray:
    """Codebooks for a weight, and its codes.

    Args:
        w: the weight.
        format: of the codes.
        contract_dims, batch_dims: as for `arrays.quantize_array`.
        importance: what each squared error counts; of a shape that broadcasts to the
            weight's.

    Raises:
        ValueError: codes of so many weights do not fit.
    """
    contract, batch = ([d % w.ndim for d in ds] for ds in (contract_dims, batch_dims))
    shared = format.blocks(w.shape, contract, batch)
    along = format.vector_dim(w.shape, contract)
    x, scale = w.astype(jnp.float32), None
    weight = jnp.ones(w.shape) if importance is None else importance
    weight = jnp.broadcast_to(weight, w.shape)
    if format.scaled:
        whole = [n if d in contract else 1 for d, n in enumerate(w.shape)]
        size = jnp.sqrt(blocks.total(x * x, whole) / math.prod(whole))
        scale = jnp.where(size == 0, 1.0, size)
        x, weight = x / scale, weight * scale**2
    lengths = [n // m for n, m in zip(w.shape, shared, strict=True)]
    cut = lambda x: _vectors(x, lengths, along, format.dim)
    x, weight = cut(x), cut(weight)
    floor = 1e-6 * jnp.mean(weight)  # what counts for nothing still gets a code
    weight = weight + jnp.where(floor > 0, floor, 1.0)
    code_shape = list(w.shape)
    code_shape[along] //= format.dim

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        left, weight = pair
        books, codes = [], []
        for s in range(format.stages):
            book = kmeans(
                left, weight, k=2**format.bits, steps=format.steps, key=jr.key(s)
            )
            code = nearest(left, weight, book)[0]
            books, codes, left = [*books, book], [*codes, code], left - book[code]
        return jnp.stack(books), jnp.stack(codes, -1)

    books, codes = jax.lax.map(one, (x, weight))
    codes = _back(codes, code_shape, lengths).astype(jnp.uint8)
    like = VectorArray(
        codes=codes,
        books=books,
        scale=scale,
        bits=format.bits,
        dtype_name=jnp.dtype(w.dtype).name,
        along=along - w.ndim,
        packed=None,
        length=0,
    )
    free = [d for d in range(w.ndim) if d not in batch] or [along]
    books = books.reshape(*lengths, *books.shape[1:])
    return _stored(codes, books, scale, like, free)


def _vectors(x: Array, lengths: Sequence[int], along: int, dim: int) -> Array:
    """(blocks, vectors, dim): neighbours that are coded together, block by block."""
    shape = list(x.shape)
    x = x.reshape(*shape[:along], shape[along] // dim, dim, *shape[along + 1 :])
    x = jnp.moveaxis(x, along + 1, -1)
    return _split(x, lengths, x.shape[:-1]).reshape(math.prod(lengths), -1, dim)


def _split(x: Array, lengths: Sequence[int], shape: Sequence[int]) -> Array:
    pieces = [m for n, k in zip(shape, lengths, strict=True) for m in (k, n // k)]
    n = len(shape)
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2), 2 * n]
    return x.reshape(*pieces, -1).transpose(order)


def _back(codes: Array, shape: Sequence[int], lengths: Sequence[int]) -> Array:
    """(blocks, vectors, stages) in the order of the weight."""
    n = len(shape)
    sizes = [m // k for m, k in zip(shape, lengths, strict=True)]
    codes = codes.reshape(*lengths, *sizes, codes.shape[-1])
    order = [d for pair in zip(range(n), range(n, 2 * n), strict=True) for d in pair]
    return codes.transpose([*order, 2 * n]).reshape(*shape, codes.shape[-1])


def _stored(
    codes: Array,
    books: Array,
    scale: Array | None,
    like: VectorArray,
    free: Sequence[int] | None = None,
) -> VectorArray:
    """With the codes packed along that of the `free` dims which wastes least."""
    packed = None if like.packed is None else like.packed + codes.ndim
    if free is not None and like.bits < 8:
        per_run, n_bytes = run(like.bits)
        size = lambda d: packed_size(codes.shape[d], like.bits) * per_run / n_bytes
        packed = min(reversed(free), key=lambda d: size(d) / codes.shape[d])
    length = 0
    if packed is not None:
        length = codes.shape[packed]
        codes = pack(codes, like.bits, packed)
    return dataclasses.replace(
        like,
        codes=codes,
        books=books,
        scale=scale,
        packed=None if packed is None else packed - codes.ndim,
        length=length,
    )
