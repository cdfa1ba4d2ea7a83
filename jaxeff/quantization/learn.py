"""Codebooks learned from a weight by k-means, and the codes of each weight.

Law: with codebooks given, each code picks the vector nearest to what the stages
before it left. The distance is what k-means left, and has no bound of its own.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from . import blocks
from .codebook import Codebook
from .kmeans import kmeans, nearest
from .packing import pack_dim
from .vector import VectorArray


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
    books = books.reshape(*lengths, *books.shape[1:])
    packed = None
    if format.bits < 8:
        # Of the codes, whose last dim are the stages.
        packed = pack_dim(code_shape, batch, format.bits) - 1
    return like.stored(codes, books, scale, packed)


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
