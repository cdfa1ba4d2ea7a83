"""Magnitude pruning as a gradient transformation.

The mask lives in the optimizer state, so pruning chains with any optax
optimizer and the model never learns that it is being pruned. This module
decides *which* weights go; `schedules.py` decides how many, and when.

Source: Zhu & Gupta 2017, arXiv:1710.01878.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from jaxeff import tree

from .schedules import Schedule


def keep_largest(
    w: Inexact[Array, "*dims"],
    sparsity: Float[Array, ""] | float | int,
    kept: Bool[Array, "*dims"] | bool = True,
) -> Bool[Array, "*dims"]:
    """Mask that drops the `sparsity` fraction of `w` nearest zero. True = kept.

    Exactly round(sparsity * size) are dropped, in float32 arithmetic; among equals
    those that come first.

    Args:
        w: the weights; a nan counts as large.
        sparsity: in [0, 1].
        kept: what an earlier mask kept; what it dropped is dropped first.
    """
    n_drop = jnp.round(sparsity * w.size).astype(jnp.int32)
    # Stable, smallest first. What was dropped is 0, but others may be 0 too.
    order = jnp.argsort(jnp.where(kept, jnp.abs(w), -1), axis=None)
    # Ranks are distinct, so ties cannot make us drop too many.
    keep = jnp.arange(w.size) >= n_drop
    mask = jnp.zeros(w.size, bool).at[order].set(keep, unique_indices=True)
    return mask.reshape(w.shape)


class PruneState(NamedTuple):
    """What pruning carries from step to step: arrays only, so any checkpoint does.

    Attributes:
        step: how many updates were made.
        sparsity: the fraction that the mask drops of every leaf it covers.
        mask: like params, True = kept; None for a leaf that is never pruned.
    """

    step: Int[Array, ""]  # not `count`, which is a method of tuple
    sparsity: Float[Array, ""]
    mask: PyTree


def prune_by_magnitude(
    schedule: Schedule, *, only: tree.Patterns | None = None
) -> optax.GradientTransformation:
    """Sets the smallest weights of every leaf to exactly zero.

    Place it last in an `optax.chain`: it rewrites the final update. The weights are
    ranked when the schedule rises, as they are before that step; between two rises
    the mask stays, and so do its zeros, whatever the optimizer makes of them.

    Laws: after step t exactly round(schedule(t) * size) weights of each covered leaf
    are dropped, and are 0 in every dtype; the others get the very update that they
    would have got without pruning; and while the schedule does not fall a dropped
    weight stays dropped.

    Args:
        schedule: maps the step to the fraction to drop, in [0, 1).
        only: patterns of the weights to prune. By default every floating-point
            array of two dims or more, which leaves out biases and the scales of
            norms, unless a scan stacks them.

    Raises:
        ValueError: at `init`, where a pattern matches no weight or nothing is left to
            prune; at `update`, where it is called without params.
    """

    def init(params):
        covered = _covered(params, only)
        keep_all = lambda p, c: jnp.ones(jnp.shape(p), bool) if c else None
        mask = jax.tree.map(keep_all, params, covered)
        return PruneState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), mask)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "prune_by_magnitude ranks the weights themselves: "
                "call `tx.update(grads, state, params)`."
            )
        sparsity = jnp.asarray(schedule(state.step), jnp.float32)

        def rank(mask):
            drop = lambda m, p: None if m is None else keep_largest(p, sparsity, m)
            return jax.tree.map(drop, mask, params, is_leaf=_is_none)

        # Sorting every weight costs more than many a step: only where it is due.
        rises = sparsity != state.sparsity
        mask = jax.lax.cond(rises, rank, lambda mask: mask, state.mask)
        updates = jax.tree.map(_masked, mask, updates, params, is_leaf=_is_none)
        return updates, PruneState(state.step + 1, sparsity, mask)

    return optax.GradientTransformation(init, update)


def _masked(mask: Array | None, update: Any, p: Any) -> Any:
    if mask is None:
        return update
    # p + (-p) is exactly 0, in every dtype; and so in the wider of two.
    return jnp.where(mask, update, -p)


def _is_none(x: Any) -> bool:
    return x is None


def _covered(params: PyTree, only: tree.Patterns | None) -> PyTree:
    """Like params: which weights are pruned."""
    names = tree.paths(params)
    if only is None:
        chosen = [n for n, p in names.items() if jnp.ndim(p) >= 2]
    else:
        chosen = tree.match(only, names)
    chosen = {n for n in chosen if jnp.issubdtype(names[n].dtype, jnp.inexact)}
    if not chosen:
        shapes = ", ".join(f"{n}{list(jnp.shape(p))}" for n, p in names.items())
        raise ValueError(
            "nothing to prune: there is no floating-point array "
            + ("of two dims or more " if only is None else f"that matches {only!r} ")
            + f"among {shapes or 'no weights at all'}. `only=` names others."
        )
    covers = lambda path, p: tree.path_name(path) in chosen
    return jax.tree_util.tree_map_with_path(covers, params)
