"""Which weights of a matrix go, given a score for each: the lowest, in equal shares.

Ties go to the first in order, so that the same weights go on every machine.
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .ranking import order_keys, smallest


class NM(NamedTuple):
    """`n` of each `m` neighbouring inputs of an output stay: "2:4"."""

    n: int
    m: int


Sparsity = float | NM


def parse_sparsity(sparsity: float | int | str) -> Sparsity:
    """A fraction to drop, in [0, 1), or a pattern such as "2:4".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(sparsity, str):
        found = re.fullmatch(r"(\d+):(\d+)", sparsity)
        n, m = map(int, found.groups()) if found else (0, 0)
        # 128: the block of columns in which SparseGPT chooses.
        if not 1 <= n <= m <= 128:
            raise ValueError(
                f"a pattern N:M keeps N of each M inputs, 1 <= N <= M <= 128, got "
                f"{sparsity!r}: write '2:4'."
            )
        return NM(n, m)
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction that goes, in [0, 1), got {sparsity}: 0.5 drops "
            "half, '2:4' two of each four."
        )
    return float(sparsity)


def lowest(score: Float[Array, "*batch n"], count: int | Array) -> Bool[Array, "..."]:
    """True at the `count` lowest of each row; among equals at the first."""
    return smallest([order_keys(score)], [jnp.asarray(count)], ((score.ndim - 1,),))[0]


def drop_n_of_m(
    score: Float[Array, "*batch cols"], pattern: NM
) -> Bool[Array, "*batch cols"]:
    """True at the m - n lowest of each m neighbours."""
    groups = score.reshape(*score.shape[:-1], -1, pattern.m)
    return lowest(groups, pattern.m - pattern.n).reshape(score.shape)


def drop_by_row(
    score: Float[Array, "*batch rows cols"], sparsity: Sparsity
) -> Bool[Array, "*batch rows cols"]:
    """True at the lowest int(cols * sparsity) of each row, or by pattern."""
    if isinstance(sparsity, NM):
        return drop_n_of_m(score, sparsity)
    return lowest(score, int(score.shape[-1] * sparsity))


def drop_anywhere(
    score: Float[Array, "groups rows cols"], sparsity: Sparsity
) -> Bool[Array, "groups rows cols"]:
    """True at the lowest int(size * sparsity) of all, or by pattern."""
    if isinstance(sparsity, NM):
        return drop_n_of_m(score, sparsity)
    count = int(math.prod(score.shape) * sparsity)
    return lowest(score.reshape(-1), count).reshape(score.shape)
