"""Truncated singular value decomposition of an array cut in two.

Law: the squared error is the sum of the squares of the singular values left
out, and no factors of that rank have a smaller one.

Source: Eckart & Young 1936, "The approximation of one matrix by another of
lower rank".
"""

import dataclasses
import math

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
        raise ValueError(f"the energy to keep is a fraction in (0, 1], got {fraction}.")
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
    check_rank(rank)
    n = batch + rows
    if not 0 < rows < w.ndim - batch:
        raise ValueError(
            f"rows, columns and {batch} batch dims share the {w.ndim} dims of the "
            f"array, at least one each, got rows={rows}."
        )
    m, k = math.prod(w.shape[batch:n]), math.prod(w.shape[n:])
    full = min(m, k)
    if isinstance(rank, int) and rank > full:
        raise ValueError(f"a {m} x {k} matrix has at most rank {full}, got {rank}.")
    if isinstance(rank, Energy) and isinstance(w, jax.core.Tracer):
        raise ValueError(
            "energy(...) depends on the values of the weight, but only its shape is "
            "known here. Give the rank as a number or a fraction."
        )
    # float32: LAPACK has no narrower type.
    matrices = w.reshape(*w.shape[:batch], m, k).astype(jnp.float32)
    u, s, v = jnp.linalg.svd(matrices, full_matrices=False)
    r = _rank(rank, full, s)
    root = jnp.sqrt(s[..., :r])
    u = u[..., :r] * jnp.expand_dims(root, -2)
    v = v[..., :r, :] * jnp.expand_dims(root, -1)
    return Factored(
        u.reshape(*w.shape[:n], r).astype(w.dtype),
        v.reshape(*w.shape[:batch], r, *w.shape[n:]).astype(w.dtype),
        cols=w.ndim - n,
    )


def _rank(rank: Rank, full: int, singular: Float[Array, "*batch full"]) -> int:
    if isinstance(rank, int):
        return rank
    if isinstance(rank, float):
        return max(1, round(rank * full))
    squares = np.asarray(singular, np.float64) ** 2
    left = squares.sum(-1, keepdims=True) - squares.cumsum(-1)
    # All that is allowed to go, and the rounding of what float32 calls zero.
    allowed = (1 - rank.fraction + 1e-12) * squares.sum(-1, keepdims=True)
    return min(full, int((left > allowed).sum(-1).max()) + 1)
