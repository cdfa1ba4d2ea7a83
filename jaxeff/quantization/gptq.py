"""GPTQ on one matrix: the columns that follow make up for each rounding error.

This module knows matrices only; which they are, and with what data, is for
`calibrated.py`, and how errors are spread for `program.change_columns`.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxeff.program import change_columns

from .formats import Format
from .grids import Grid
from .scales import fit, Scales


def round_units(
    x: Float[Array, "..."], scale: Float[Array, "..."], zero: Array | None, grid: Grid
) -> Float[Array, "..."]:
    """The nearest of what the codes stand for, entry by entry.

    Args:
        x: weights.
        scale: of each, float32; broadcasts.
        zero: of each, if the grid has one.
        grid: the numbers.
    """
    if zero is None:
        return grid.nearest(x / scale) * scale
    return (grid.nearest(x / scale + zero) - zero) * scale


@functools.partial(
    jax.jit, static_argnames=("grid", "activation_order", "block", "damping")
)
def gptq_matrix(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    scale: Float[Array, "rows cols"],
    zero: Float[Array, "rows cols"] | None,
    *,
    grid: Grid,
    activation_order: bool = True,
    block: int = 128,
    damping: float = 0.01,
) -> Float[Array, "rows cols"]:
    """The matrix rounded to the grid under scales that are given.

    Laws: every entry is a number of the grid times its scale; with `h` a multiple of
    the identity it is the nearest one.

    Args:
        w: an output per row, an input per column.
        h: x^T x of the inputs, or any multiple of it.
        scale, zero: of each weight.
        grid: the numbers.
        activation_order: take the columns with the largest inputs first, when most
            others are left to make up for their errors.
        block, damping: see `program.change_columns`.
    """
    order = jnp.arange(w.shape[1])
    if activation_order:
        order = jnp.argsort(-jnp.diagonal(h))
    scale, zero = scale[:, order], None if zero is None else zero[:, order]

    def change(k, at, part, factor, state):
        # Columns beyond the last are zeros, and the last one's scale does for them.
        s, z = scale[:, at], None if zero is None else zero[:, at]
        return round_units(part[:, k], s, z, grid), state

    new, _ = change_columns(
        w[:, order], h[order][:, order], change, (), block=block, damping=damping
    )
    return new[:, jnp.argsort(order)]


@functools.partial(jax.jit, static_argnames=("format", "block", "damping", "method"))
def gptq_groups(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    *,
    format: Format,
    block: int = 128,
    damping: float = 0.01,
    method: str = "absmax",
) -> tuple[Float[Array, "rows cols"], Scales]:
    """The matrix rounded in groups, each scaled when its first column is reached.

    By then its weights have made up for the errors before it, so the scale fits what
    is rounded. (Columns keep their order: a group is a run of them.)

    Args:
        w, h, block, damping: as for `gptq_matrix`.
        format: with a group that divides the columns, and scales of float32.
        method: see `scales.fit`.

    Returns:
        The matrix, and its scales, of shape (rows, groups).
    """
    rows, cols = w.shape
    group = format.group or cols
    # Whole groups to a block, so that all of a group is there when it begins.
    block = -(-min(block, cols) // group) * group
    n = -(-cols // block) * (block // group)
    # Of the columns that fill the last block nothing is kept.
    squares = jnp.pad(jnp.diagonal(h), (0, n * group - cols), constant_values=1.0)

    def alone(part: Array, squares: Array) -> Scales:
        by = {"importance": squares[None], "method": method}
        return fit(part, format, (1, group), **by)

    begin = jax.eval_shape(alone, w[:, :group], squares[:group])
    begin = jax.tree.map(lambda x: jnp.ones((rows, n), x.dtype), begin)

    def scaled(state, part, k, at):
        columns = jax.lax.dynamic_slice(part, (0, k), (rows, group))
        found = alone(columns, jax.lax.dynamic_slice(squares, (at,), (group,)))
        put = lambda all, one: jax.lax.dynamic_update_slice(all, one, (0, at // group))
        return jax.tree.map(put, state, found)

    def change(k, at, part, factor, state):
        keep = lambda state, part, k, at: state
        state = jax.lax.cond(k % group == 0, scaled, keep, state, part, k, at)
        s = state.scale[:, at // group]
        z = None if state.zero is None else state.zero[:, at // group]
        z = None if z is None else z.astype(jnp.float32)
        return round_units(part[:, k], s, z, format.grid), state

    new, scales = change_columns(w, h, change, begin, block=block, damping=damping)
    return new, jax.tree.map(lambda x: x[:, : cols // group], scales)
