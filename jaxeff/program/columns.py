"""Changes a matrix column by column; the columns that follow make up for each error.

The squared error of `x @ w.T` under a change d of `w` is d H d^T with H = x^T x. When
a column gets a new value, the change of the columns to its right that makes this
least is a multiple of a row of the inverse Hessian's factor. Pruning (SparseGPT)
and quantization (GPTQ) differ in the new value alone.

Sources: Frantar & Alistarh 2023, arXiv:2301.00774, section 3; Frantar et al. 2022,
arXiv:2210.17323, section 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST

# (column in its block, and in the matrix; the block; the inverse's factor there;
# state) -> (the column's new value, state).
Change = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


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
    # Back in the units of `h`, so that scores are those of the papers.
    return jnp.where(mean > 0, u / jnp.sqrt(jnp.where(mean > 0, mean, 1)), u)


def change_columns(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    change: Change,
    state: Any,
    *,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Float[Array, "rows cols"], Any]:
    """The matrix with each column changed, and the others made up for it.

    Columns are taken from left to right in blocks: what follows within a block is
    changed at once, what follows after it by one product for the whole block. The
    number of equations does not depend on that of columns.

    Args:
        w: an output per row, an input per column.
        h: x^T x of the inputs, or any multiple of it.
        change: `change(k, column, part, factor, state)` gives the new value of
            column `k` of a block, a vector of rows, and the next state. `part` is
            the block as it is now, `factor` the square of `inverse_factor` there.
            Columns beyond the last, which fill the last block, are passed as well.
        state: any pytree of arrays.
        block: columns.
        damping: see `inverse_factor`.
    """
    rows, cols = w.shape
    block = min(block, cols)
    n_blocks = -(-cols // block)
    padded = n_blocks * block
    u = jnp.eye(padded, dtype=w.dtype)
    u = u.at[:cols, :cols].set(inverse_factor(h, damping))
    w = jnp.pad(w, ((0, 0), (0, padded - cols)))
    at = jnp.arange(padded)

    def step(j: Int[Array, ""], carry: tuple) -> tuple:
        w, state = carry
        start = j * block
        part = jax.lax.dynamic_slice(w, (0, start), (rows, block))
        inner = jax.lax.dynamic_slice(u, (start, start), (block, block))
        part, errors, state = _block(part, inner, start, change, state)
        w = jax.lax.dynamic_update_slice(w, part, (0, start))
        across = jax.lax.dynamic_slice(u, (start, 0), (block, padded))
        across = jnp.where((at >= start + block)[None], across, 0)
        return w - jnp.matmul(errors, across, precision=_HIGHEST), state

    w, state = jax.lax.fori_loop(0, n_blocks, step, (w, state))
    return w[:, :cols], state


def _block(
    w: Float[Array, "rows block"],
    u: Float[Array, "block block"],
    start: Int[Array, ""],
    change: Change,
    state: Any,
) -> tuple[Float[Array, "rows block"], Float[Array, "rows block"], Any]:
    """One block changed, and the errors to spread beyond it."""

    def column(k, carry):
        w, errors, state = carry
        new, state = change(k, start + k, w, u, state)
        error = (w[:, k] - new) / u[k, k]
        # Zero to the left of column k, where `u` is.
        w = w - error[:, None] * u[k][None]
        return w.at[:, k].set(new), errors.at[:, k].set(error), state

    begin = (w, jnp.zeros_like(w), state)
    return jax.lax.fori_loop(0, w.shape[1], column, begin)
