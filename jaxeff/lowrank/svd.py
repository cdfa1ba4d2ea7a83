"""Truncated singular value decomposition of an array cut in two.

Law: the squared error is the sum of the squares of the singular values left
out, and no factors of that rank have a smaller one.

Source: Eckart & Young 1936, "The approximation of one matrix by another of
lower rank".
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .factored import Factored


@dataclasses.dataclass(frozen=True)
class Energy:
    """A rank by what it keeps; see `energy`."""

    fraction: float


def energy(fraction: float | int) -> Energy:
    """The smallest rank that keeps this fraction of the squared singular values.

    1 - `fraction` is then the squared relative error of the weight, at most.

    Raises:
        ValueError: `fraction` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"the energy to keep is a fraction in (0, 1], got {fraction}. 0.9 keeps "
            "nine tenths of the squared singular values."
        )
    return Energy(float(fraction))


Rank = int | float | Energy


def check_rank(rank: Rank) -> None:
    """Raises ValueError for what is no rank of any array."""
    if isinstance(rank, Energy):
        return
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if (whole and rank >= 1) or (isinstance(rank, float) and 0 < rank <= 1):
        return
    raise ValueError(
        "a rank is a whole number from 1 on, a fraction of the full rank in (0, 1], or "
        f"energy(fraction), got {rank!r}."
    )


def factor_array(
    w: Float[Array, "..."], rank: Rank, *, rows: int, batch: int = 0
) -> Factored:
    """The best approximation of an array by two factors.

    Each factor takes the root of the singular values, so that both train at one
    learning rate and round alike in few bits.

    Args:
        w: dims (*batch, *rows, *cols).
        rank: of each matrix in the batch: a number, a fraction of the full rank
            min(rows, cols), or `energy(fraction)`: the largest that any of them needs.
        rows: how many dims the first factor takes.
        batch: how many leading dims index matrices of their own.

    Raises:
        ValueError: the rank is no rank, or larger than the full one, or depends on
            values while `w` has none (inside `jit`).
    """
    return _truncate(w, rank_number(w, rank, rows=rows, batch=batch), rows, batch)


def matrix_shape(shape: Sequence[int], rows: int, batch: int) -> tuple[int, int]:
    """Rows and columns of each matrix that an array of that shape is cut into."""
    if not 0 < rows < len(shape) - batch:
        raise ValueError(
            f"rows, columns and {batch} batch dims share the {len(shape)} dims of the "
            f"array, at least one each, got rows={rows}."
        )
    n = batch + rows
    return math.prod(shape[batch:n]), math.prod(shape[n:])


def rank_number(w: Any, rank: Rank, *, rows: int, batch: int = 0) -> int:
    """The rank of the factors of `w` as a number; see `factor_array`.

    Unless it is an `energy`, the shape of `w` is enough.
    """
    check_rank(rank)
    m, n = matrix_shape(w.shape, rows, batch)
    full = min(m, n)
    if isinstance(rank, int):
        if rank > full:
            raise ValueError(f"a {m} x {n} matrix has at most rank {full}, got {rank}.")
        return rank
    if isinstance(rank, float):
        return max(1, round(rank * full))
    if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise ValueError(
            "energy(...) depends on the values of the weight, but only its shape is "
            "known here. Give the rank as a number or a fraction."
        )
    matrices = w.reshape(*w.shape[:batch], m, n).astype(jnp.float32)
    singular = jnp.linalg.svd(matrices, compute_uv=False)
    squares = np.asarray(singular, np.float64) ** 2
    left = squares.sum(-1, keepdims=True) - squares.cumsum(-1)
    # All that is allowed to go, and the rounding of what float32 calls zero.
    allowed = (1 - rank.fraction + 1e-12) * squares.sum(-1, keepdims=True)
    return min(full, int((left > allowed).sum(-1).max()) + 1)


@functools.partial(jax.jit, static_argnames=("r", "rows", "batch"))
def _truncate(w: Float[Array, "..."], r: int, rows: int, batch: int) -> Factored:
    n, matrix = batch + rows, matrix_shape(w.shape, rows, batch)
    # float32: LAPACK has no narrower type.
    matrices = w.reshape(*w.shape[:batch], *matrix).astype(jnp.float32)
    u, s, v = jnp.linalg.svd(matrices, full_matrices=False)
    root = jnp.sqrt(s[..., :r])
    u = u[..., :r] * jnp.expand_dims(root, -2)
    v = v[..., :r, :] * jnp.expand_dims(root, -1)
    return Factored(
        u.reshape(*w.shape[:n], r).astype(w.dtype),
        v.reshape(*w.shape[:batch], r, *w.shape[n:]).astype(w.dtype),
        cols=w.ndim - n,
    )
