"""GPTQ with codebooks: each vector takes the code whose error costs least.

With u the inverse Hessian's factor, changing neighbouring columns by d costs the
squared length of d times the inverse of u's square there, once the columns to the
right have made up for it. So the nearest vector is looked for in that metric, and
for single columns it is the nearest number.

This module knows matrices only, as `gptq.py` does.

Source: van Baalen et al. 2024, arXiv:2402.15319 (GPTVQ), section 3.2.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxeff.program import change_columns

_HIGHEST = jax.lax.Precision.HIGHEST
_SWEEPS = 2


@functools.partial(jax.jit, static_argnames=("activation_order", "block", "damping"))
def gptq_codes(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    books: Float[Array, "books stages codes dim"],
    book: Int[Array, " rows"],
    scale: Float[Array, " rows"],
    *,
    activation_order: bool = True,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Float[Array, "rows cols"], Int[Array, "rows vectors stages"]]:
    """The matrix made of vectors of codebooks that are given, and their codes.

    Laws: each run of `dim` columns is the sum over stages of the vectors its codes
    pick, times the row's scale; with a single stage and `h` a multiple of the identity
    each code picks the nearest vector.

    Args:
        w: an output per row, an input per column; `dim` divides the columns.
        h: x^T x of the inputs, or any multiple of it.
        books: the codebooks.
        book: which of them each row takes.
        scale: of each row.
        activation_order: take the vectors with the largest inputs first.
        block, damping: see `program.change_columns`.
    """
    (rows, cols), (_, stages, _, dim) = w.shape, books.shape
    order = jnp.arange(cols // dim)
    if activation_order:
        order = jnp.argsort(-jnp.diagonal(h).reshape(-1, dim).sum(1))
    columns = (order[:, None] * dim + jnp.arange(dim)[None]).reshape(-1)
    block = -(-min(block, cols) // dim) * dim  # whole vectors

    def choose(start, at, part, factor, state):
        codes, _ = state
        here = jax.lax.dynamic_slice(factor, (start, start), (dim, dim))
        metric = jax.scipy.linalg.solve_triangular(here, jnp.eye(dim), lower=False)
        wanted = jax.lax.dynamic_slice(part, (0, start), (rows, dim))
        parts, picked = jnp.zeros((stages, rows, dim)), [jnp.zeros(rows, int)] * stages
        # One after the other, and then each again given the others.
        for stage in [*range(stages)] * (1 if stages == 1 else 1 + _SWEEPS):
            left = wanted - parts.sum(0) + parts[stage]
            code = _nearest(left, books[:, stage], book, scale, metric)
            parts = parts.at[stage].set(scale[:, None] * books[book, stage, code])
            picked[stage] = code
        # A column beyond the last writes to no code there is.
        new = codes.at[:, at // dim].set(jnp.stack(picked, -1), mode="drop")
        return new, parts.sum(0)

    def change(j, at, part, factor, state):
        keep = lambda start, at, part, factor, state: state
        state = jax.lax.cond(j % dim == 0, choose, keep, j, at, part, factor, state)
        return state[1][:, j % dim], state

    begin = jnp.zeros((rows, cols // dim, stages), jnp.int32), jnp.zeros((rows, dim))
    h = h[columns][:, columns]
    new, (codes, _) = change_columns(
        w[:, columns], h, change, begin, block=block, damping=damping
    )
    return new[:, jnp.argsort(columns)], codes[:, jnp.argsort(order)]


def _nearest(
    x: Float[Array, "rows dim"],
    books: Float[Array, "books codes dim"],
    book: Int[Array, " rows"],
    scale: Float[Array, " rows"],
    metric: Float[Array, "dim dim"],
) -> Int[Array, " rows"]:
    """For each row the code whose scaled vector is nearest, in a metric."""
    vectors = jnp.matmul(books, metric, precision=_HIGHEST)
    x = jnp.matmul(x, metric, precision=_HIGHEST) / scale[:, None]
    squares = jnp.sum(vectors * vectors, axis=-1)
    if books.shape[0] == 1:  # all rows share it: no copy for each
        products = jnp.matmul(x, vectors[0].T, precision=_HIGHEST)
        return jnp.argmin(squares - 2 * products, axis=1).astype(jnp.int32)
    products = jnp.einsum("rd,rkd->rk", x, vectors[book], precision=_HIGHEST)
    return jnp.argmin(squares[book] - 2 * products, axis=1).astype(jnp.int32)
