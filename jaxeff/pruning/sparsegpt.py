"""SparseGPT on one matrix: what is dropped, the inputs to its right make up for.

Columns are taken from left to right in blocks. Within a block the weights go whose
loss costs least, and each error is spread over the columns that follow, as the
inverse Hessian of the squared error says. This module knows matrices only; which
they are, and with what data, is for `one_shot.py`.

Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .lowest import drop_n_of_m, lowest, NM, Sparsity

_HIGHEST = jax.lax.Precision.HIGHEST


def inverse_factor(
    h: Float[Array, "cols cols"], damping: float
) -> Float[Array, "cols cols"]:
    """The upper triangular `u` with `u.T @ u` = the inverse of the damped `h`.

    It is the Cholesky factor of the inverse, made without the inverse itself: with
    rows and columns in reverse order the factor of `h` is upper triangular, and `u`
    is the inverse of that.

    Args:
        h: symmetric, positive semidefinite. All zeros count as the identity.
        damping: times the mean of the diagonal is added to the diagonal.
    """
    mean = jnp.mean(jnp.diagonal(h))
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    h = jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1), eye) + damping * eye
    upper = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    u = jax.scipy.linalg.solve_triangular(upper, eye, lower=False)
    # Back in the units of `h`, so that scores are those of the paper.
    return jnp.where(mean > 0, u / jnp.sqrt(jnp.where(mean > 0, mean, 1)), u)


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
        damping: see `inverse_factor`.
    """
    rows, cols = w.shape
    block = min(block, cols)
    if isinstance(sparsity, NM):
        block = max(sparsity.m, block // sparsity.m * sparsity.m)
    n_blocks = -(-cols // block)
    padded = n_blocks * block
    u = jnp.eye(padded, dtype=w.dtype)
    u = u.at[:cols, :cols].set(inverse_factor(h, damping))
    w = jnp.pad(w, ((0, 0), (0, padded - cols)))
    counts = jnp.asarray(_shares(rows, cols, block, sparsity), jnp.int32)
    at = jnp.arange(padded)
    # What multiplies zeros alone costs nothing. (If all does, all count the same.)
    dead = (jnp.diagonal(h) == 0) & jnp.any(jnp.diagonal(h) > 0)
    scale = (
        jnp.diagonal(u).at[:cols].set(jnp.where(dead, jnp.inf, jnp.diagonal(u)[:cols]))
    )

    def step(j, w):
        start = j * block
        part = jax.lax.dynamic_slice(w, (0, start), (rows, block))
        inner = jax.lax.dynamic_slice(u, (start, start), (block, block))
        near = jax.lax.dynamic_slice(scale, (start,), (block,))
        if isinstance(sparsity, NM):
            drop, pattern = jnp.zeros(part.shape, bool), sparsity
        else:
            score = (part / near[None]) ** 2
            real = jax.lax.dynamic_slice(at, (start,), (block,)) < cols
            score = jnp.where(real[None], score, jnp.inf)
            drop = lowest(score.reshape(-1), counts[j]).reshape(part.shape)
            pattern = None
        part, errors = _block(part, inner, near, drop, pattern)
        w = jax.lax.dynamic_update_slice(w, part, (0, start))
        across = jax.lax.dynamic_slice(u, (start, 0), (block, padded))
        across = jnp.where((at >= start + block)[None], across, 0)
        return w - jnp.matmul(errors, across, precision=_HIGHEST)

    return jax.lax.fori_loop(0, n_blocks, step, w)[:, :cols]


def _block(
    w: Float[Array, "rows block"],
    u: Float[Array, "block block"],
    scale: Float[Array, " block"],
    drop: Bool[Array, "rows block"],
    pattern: NM | None,
) -> tuple[Float[Array, "rows block"], Float[Array, "rows block"]]:
    """One block without what is dropped, and the errors to spread beyond it."""
    diagonal = jnp.diagonal(u)

    def choose(k, w, drop):
        assert pattern is not None
        near = jax.lax.dynamic_slice(w, (0, k), (w.shape[0], pattern.m))
        by = jax.lax.dynamic_slice(scale, (k,), (pattern.m,))
        lost = drop_n_of_m((near / by[None]) ** 2, pattern)
        return jax.lax.dynamic_update_slice(drop, lost, (0, k))

    def column(k, carry):
        w, errors, drop = carry
        if pattern is not None:  # a group is chosen when its first column is reached
            begins, keep = k % pattern.m == 0, lambda k, w, drop: drop
            drop = jax.lax.cond(begins, choose, keep, k, w, drop)
        old = w[:, k]
        new = jnp.where(drop[:, k], 0, old)
        error = (old - new) / diagonal[k]
        # Zero to the left of column k, where `u` is.
        w = w - error[:, None] * u[k][None]
        return w.at[:, k].set(new), errors.at[:, k].set(error), drop

    start = (w, jnp.zeros_like(w), drop)
    w, errors, _ = jax.lax.fori_loop(0, w.shape[1], column, start)
    return w, errors


def _shares(rows: int, cols: int, block: int, sparsity: Sparsity) -> list[int]:
    """How many weights go from each block of columns."""
    ends = [min(end, cols) for end in range(0, cols + block, block)]
    if isinstance(sparsity, NM):
        return [0] * (len(ends) - 1)
    total = int(rows * cols * sparsity)
    done = [total * end // cols for end in ends]
    return [b - a for a, b in zip(done, done[1:], strict=False)]
