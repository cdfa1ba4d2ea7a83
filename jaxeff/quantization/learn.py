"""Codebooks learned from a weight by k-means, and the codes of each weight.

Laws: with a single stage each code picks the nearest vector; with several no code
alone can be changed for a nearer sum. The distance that is left has no bound.

Source of several stages: Babenko & Lempitsky 2014, "Additive Quantization for Extreme
Vector Compression" (CVPR), section 3: codes and codebooks in turns, here from those
that are learned stage by stage.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from . import blocks
from .codebook import Codebook
from .kmeans import kmeans, nearest
from .packing import pack_dim
from .vector import VectorArray

_ROUNDS = 8


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
        books, codes = jnp.stack(books), jnp.stack(codes, -1)
        if format.stages == 1:
            return books, codes
        return refine(*pair, books, codes)

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


def refine(
    x: Float[Array, "n dim"],
    weight: Float[Array, "n dim"],
    books: Float[Array, "stages k dim"],
    codes: Int[Array, "n stages"],
    rounds: int = _ROUNDS,
) -> tuple[Float[Array, "stages k dim"], Int[Array, "n stages"]]:
    """Codebooks that are best together, and codes that are.

    Law: the weighted squared error does not grow.

    Args:
        x: vectors.
        weight: of each squared difference.
        books, codes: to begin from.
        rounds: of solving for the codebooks and choosing the codes again.
    """
    (n, dim), (stages, k, _) = x.shape, books.shape
    first = jnp.arange(stages)[None] * k  # where each stage's vectors begin

    def solve(codes: Array) -> Array:
        """The codebooks of least error for these codes."""
        at = codes + first
        pair = at[:, :, None], at[:, None, :]
        shape = (stages * k, stages * k)

        def one(x: Array, w: Array) -> Array:
            """One number of all vectors."""
            each = jnp.broadcast_to(w[:, None, None], (n, stages, stages))
            both = jnp.zeros(shape).at[pair].add(each)
            sums = (
                jnp.zeros(shape[0])
                .at[at]
                .add(jnp.broadcast_to((w * x)[:, None], at.shape))
            )
            # Only sums of stages matter, so there is more than one answer.
            both = both + 1e-5 * jnp.mean(jnp.diagonal(both)) * jnp.eye(shape[0])
            return jax.scipy.linalg.solve(both, sums, assume_a="pos")

        found = jax.lax.map(lambda pair: one(*pair), (x.T, weight.T))
        return found.T.reshape(stages, k, dim)

    def choose(books: Array, codes: Array) -> Array:
        """Each stage's codes, given those of the others."""
        for s in range(stages):
            made = [books[t][codes[:, t]] for t in range(stages) if t != s]
            left = x - sum(made[1:], made[0])
            codes = codes.at[:, s].set(nearest(left, weight, books[s])[0])
        return codes

    def lost(books: Array, codes: Array) -> Array:
        made = sum(books[t][codes[:, t]] for t in range(stages))
        return jnp.sum(weight * (x - made) ** 2)

    def step(_, best):
        new = solve(best[1])
        new = new, choose(new, best[1])
        # Solved in float32, they may be worse by a rounding.
        better = lost(*new) < lost(*best)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    return jax.lax.fori_loop(0, rounds, step, (books, codes))


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
