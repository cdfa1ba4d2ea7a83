"""SparseGPT on one matrix: what is dropped, the inputs to its right make up for.

Within a block of columns the weights go whose loss costs least. How each error is
spread is in `program.change_columns`. This module knows matrices only; which they
are, and with what data, is for `calibrated.py`.

Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxeff.program import change_columns

from .lowest import drop_n_of_m, lowest, NM, Sparsity


@functools.partial(jax.jit, static_argnames=("sparsity", "block", "damping"))
def prune_matrix(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    sparsity: Sparsity,
    *,
    block: int = 128,
    damping: float = 0.01,
) -> Float[Array, "rows cols"]:
    """The matrix with weights dropped, and the others changed to make up for them.

    Exactly int(rows * cols * sparsity) go, from each block of columns its share;
    the paper's own code drops one more per block. With a pattern N:M, N of each M
    neighbouring columns stay in each row, and `cols` is a multiple of M.

    Laws: sparsity 0 changes nothing; with `h` a multiple of the identity the
    smallest weights of each block go and no other changes.

    Args:
        w: an output per row, an input per column.
        h: x^T x of the inputs, or any multiple of it.
        sparsity: a fraction in [0, 1), or a pattern.
        block: columns among which the lowest are chosen at a time.
        damping: see `program.columns.inverse_factor`.
    """
    rows, cols = w.shape
    block = min(block, cols)
    if isinstance(sparsity, NM):
        block = max(sparsity.m, block // sparsity.m * sparsity.m)
    counts = jnp.asarray(_shares(rows, cols, block, sparsity), jnp.int32)
    # What multiplies zeros alone costs nothing. (If all does, all count the same.)
    squares = jnp.diagonal(h)
    dead = jnp.pad(
        (squares == 0) & jnp.any(squares > 0), (0, len(counts) * block - cols)
    )

    def scores(part, start, factor, width):
        begins = start % block
        near = jax.lax.dynamic_slice(part, (0, begins), (rows, width))
        by = jax.lax.dynamic_slice(jnp.diagonal(factor), (begins,), (width,))
        gone = jax.lax.dynamic_slice(dead, (start,), (width,))
        return (near / jnp.where(gone, jnp.inf, by)[None]) ** 2

    def choose_block(at, part, factor, drop):
        score = scores(part, at, factor, block)
        real = at + jnp.arange(block) < cols
        score = jnp.where(real[None], score, jnp.inf)
        return lowest(score.reshape(-1), counts[at // block]).reshape(part.shape)

    def choose_group(at, part, factor, drop):
        assert isinstance(sparsity, NM)
        lost = drop_n_of_m(scores(part, at, factor, sparsity.m), sparsity)
        return jax.lax.dynamic_update_slice(drop, lost, (0, at % block))

    by_group = isinstance(sparsity, NM)
    choose, width = (choose_group, sparsity.m) if by_group else (choose_block, block)

    def change(k, at, part, factor, drop):
        # A group is chosen when its first column is reached.
        keep = lambda at, part, factor, drop: drop
        drop = jax.lax.cond(k % width == 0, choose, keep, at, part, factor, drop)
        return jnp.where(drop[:, k], 0, part[:, k]), drop

    drop = jnp.zeros((rows, block), bool)
    return change_columns(w, h, change, drop, block=block, damping=damping)[0]


def _shares(rows: int, cols: int, block: int, sparsity: Sparsity) -> list[int]:
    """How many weights go from each block of columns."""
    ends = [min(end, cols) for end in range(0, cols + block, block)]
    if isinstance(sparsity, NM):
        return [0] * (len(ends) - 1)
    total = int(rows * cols * sparsity)
    done = [total * end // cols for end in ends]
    return [b - a for a, b in zip(done, done[1:], strict=False)]
