"""Masks over a tree of weights: which weights they cover, choosing and applying them.

True = kept. A mask is a tree like params, with None where nothing is ever pruned.
*What* ranks weights is in `criteria.py`, *what* goes together in `patterns.py`, *how
many* in `distributions.py` and `schedules.py`; this module puts them together.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from jaxeff import tree
from jaxeff.program import is_leaf

from .distributions import Distribution, uniform, Units
from .patterns import Pattern, Unstructured
from .ranking import FIRST, order_keys, smallest
from .schedules import check_sparsity


class PruneState(NamedTuple):
    """What pruning carries from step to step: arrays only, so any checkpoint does.

    Attributes:
        step: how many updates were made.
        sparsity: the fraction that the schedule drops; one for each where a mapping
            of schedules is given.
        mask: like params, True = kept; None for a leaf that is never pruned.
        memory: what the criterion remembers of each covered weight, by path.
        inner: the state of the optimizer that the transform wraps.
    """

    step: Int[Array, ""]  # not `count`, which is a method of tuple
    sparsity: Float[Array, ""] | Float[Array, " rules"]
    mask: PyTree
    memory: PyTree = ()
    inner: PyTree = ()


class Rule(NamedTuple):
    """Some weights, by path, and the schedule or sparsity that they follow."""

    paths: list[str]
    value: Any


def cover(params: PyTree, value: Any, only: tree.Patterns | None) -> list[Rule]:
    """Which weights are pruned, and by what.

    Args:
        params: the weights.
        value: one schedule or sparsity; or several by pattern, where a weight
            follows the first that matches it.
        only: patterns of the weights, where there is one value. By default every
            floating-point array of two dims or more.

    The arrays of a compressed weight are never covered: a zero among the scales of a
    quantized one would be a whole channel.

    Raises:
        ValueError: a pattern matches no weight, a rule is left without any, or there
            are both a mapping and `only`.
    """
    names, inside = tree.paths(params), leaf_arrays(params)
    if not isinstance(value, Mapping):
        matrices = [n for n, p in names.items() if jnp.ndim(p) >= 2]
        chosen = {None: matrices if only is None else tree.match(only, names)}
    elif only is not None:
        raise ValueError(
            f"the patterns {list(value)} say what is pruned, so only={only!r} has "
            "nothing to say. Leave it out."
        )
    else:
        by_path = tree.assign({pattern: pattern for pattern in value}, names)
        chosen = {p: [n for n in by_path if by_path[n] == p] for p in value}
    rules = []
    for pattern, found in chosen.items():
        paths = [n for n in found if n not in inside and _can_prune(names[n])]
        if not paths:
            if any(n in inside and _can_prune(names[n]) for n in found):
                raise ValueError(
                    f"nothing to prune: the arrays {', '.join(sorted(inside)[:3])}"
                    f"{' ...' * (len(inside) > 3)} are parts of compressed weights, "
                    "which take no masks. Prune before compressing."
                )
            shapes = ", ".join(f"{n}{list(jnp.shape(p))}" for n, p in names.items())
            asked = only if pattern is None else pattern
            raise ValueError(
                "nothing to prune: there is no floating-point array "
                + ("of two dims or more " if asked is None else f"left for {asked!r} ")
                + f"among {shapes or 'no weights at all'}. `only=` names others."
            )
        rules.append(Rule(paths, value if pattern is None else value[pattern]))
    return rules


def leaf_arrays(params: PyTree) -> set[str]:
    """The paths of the arrays that compressed weights are made of."""
    return {
        f"{path}/{part}".lstrip("/")  # a leaf alone has no path
        for path, x in tree.paths(params, is_leaf).items()
        if is_leaf(x)
        for part in tree.paths(x)
    }


def _can_prune(p: Any) -> bool:
    return tree.is_array(p) and jnp.issubdtype(p.dtype, jnp.inexact) and p.size > 0


def check(rules: list[Rule], params: PyTree, pattern: Pattern, end: Any) -> None:
    """Refuses weights that a pattern does not fit; `end(value)` is a final sparsity."""
    names = tree.paths(params)
    for rule in rules:
        for path in rule.paths:
            pattern.check(path, names[path].shape, end(rule.value))


def choose_masks(
    rules: list[Rule],
    scores: Mapping[str, Array],
    *,
    pattern: Pattern,
    distribution: Distribution,
    kept: Mapping[str, Array] | None = None,
) -> dict[str, Bool[Array, "..."]]:
    """The masks of all covered weights, by path.

    Args:
        rules: of paths and sparsities.
        scores: by path; the smallest go.
        pattern: what goes together.
        distribution: how many go from each weight of a rule.
        kept: what earlier masks kept; what they dropped is dropped first. Where there
            was none, all was.
    """
    names = [path for rule in rules for path in rule.paths]
    keys = {path: order_keys(pattern.units(path, scores[path])) for path in names}
    if kept is not None:
        # Stable, smallest first. What was dropped is 0, but others may be 0 too.
        for p in [p for p in names if p in kept]:
            old = pattern.units(p, kept[p].astype(jnp.float32)) > 0
            keys[p] = jnp.where(old, keys[p], FIRST)
    counts = {}
    for rule in rules:
        units = {p: units_of(p, keys[p], scores[p].shape, pattern) for p in rule.paths}
        counts |= distribution(units, rule.value)
    return drop(keys, counts, {p: scores[p].shape for p in names}, pattern)


def units_of(path: str, keys: Array, shape: tuple[int, ...], pattern: Pattern) -> Units:
    """The units of one weight, for a distribution."""
    return Units(keys, pattern.along(path, shape), pattern.layer(path, shape))


def drop(
    keys: Mapping[str, Array],
    counts: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    pattern: Pattern,
) -> dict[str, Bool[Array, "..."]]:
    """Masks that drop the given number of units with the smallest keys, by path."""
    names = list(keys)
    along = tuple(pattern.along(path, shapes[path]) for path in names)
    gone = smallest([keys[p] for p in names], [counts[p] for p in names], along)
    return {
        path: pattern.expand(path, ~g, shapes[path])
        for path, g in zip(names, gone, strict=True)
    }


def like(params: PyTree, masks: Mapping[str, Any]) -> PyTree:
    """A tree like params of what is given by path, None elsewhere."""
    pick = lambda path, _: masks.get(tree.path_name(path))
    return jax.tree_util.tree_map_with_path(pick, params)


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

    Raises:
        ValueError: `sparsity` is a number outside [0, 1].
    """
    if isinstance(sparsity, float | int) and not 0 <= sparsity <= 1:
        raise ValueError(
            f"sparsity is the fraction to drop, in [0, 1], got {sparsity}. For 80 "
            "percent write 0.8."
        )
    masks = choose_masks(
        [Rule([""], jnp.float32(sparsity))],
        {"": jnp.abs(w)},
        pattern=Unstructured(),
        distribution=uniform,
        kept={"": jnp.broadcast_to(kept, w.shape)},
    )
    return masks[""]


def make_masks(
    scores: PyTree,
    sparsity: float | int | Mapping[str, float | int],
    *,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = uniform,
    kept: PyTree | None = None,
) -> PyTree:
    """Masks that drop the smallest scores of a tree, outside of any training.

    Args:
        scores: like params, the larger the better: `abs` of the weights, or for SNIP
            |w * grad|.
        sparsity: the fraction to drop, in [0, 1); or several by pattern.
        only: patterns of the weights to prune, where there is one sparsity. By
            default every floating-point array of two dims or more.
        pattern: `Unstructured()` by default, `Blocks` or `NofM`.
        distribution: `uniform`, `erdos_renyi`, `erk` or `global_ranking`.
        kept: what earlier masks kept, like params; what they dropped goes first.

    Returns:
        Like `scores`, True = kept; None where nothing is pruned.

    Raises:
        ValueError: nothing to prune, a sparsity is out of range, or the pattern or
            the distribution does not fit the weights.
    """
    pattern = pattern or Unstructured()
    rules = cover(scores, sparsity, only)
    for rule in rules:
        check_sparsity("sparsity", rule.value)
    check(rules, scores, pattern, float)
    names = tree.paths(scores)
    masks = choose_masks(
        rules,
        {path: names[path] for rule in rules for path in rule.paths},
        pattern=pattern,
        distribution=distribution,
        kept=None if kept is None else tree.paths(kept),
    )
    return like(scores, masks)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Params with zeros where a mask is False; gradients pass straight through.

    What is dropped gets the gradient that it would have if it were there, and what
    the mask does not cover stays as it is.

    Args:
        params: the weights.
        masks: like params, None where nothing is pruned.

    Source: Bengio et al. 2013, arXiv:1308.3432, the straight-through estimator.
    """
    return jax.tree.map(
        lambda m, p: p if absent(m) else _through(p, m), masks, params, is_leaf=absent
    )


def masked(params: PyTree, opt_state: PyTree) -> PyTree:
    """What a model with masks in its optimizer state computes with.

    Inside a loss it gives straight-through gradients, see `straight_through`; after
    training the finished weights; and before the first step of `prune`, `rigl` or
    `fix_masks` the weights that their masks leave.

    Args:
        params: what `tx.init` was given, or newer.
        opt_state: of any optax optimizer with a transform of this package in it.

    Raises:
        ValueError: no masks in the state.
    """
    states = list(prune_states(opt_state))
    if not states:
        raise ValueError(
            "the masks are in the optimizer state, but this one has none: chain a "
            "transform of jaxeff.pruning, and pass the state that its `init` returned."
        )
    for state in states:
        params = apply_masks(params, state.mask)
    return params


def prune_states(opt_state: PyTree):
    """Every PruneState of an optimizer state, outer ones first."""
    here = lambda x: isinstance(x, PruneState)
    for x in jax.tree.leaves(opt_state, is_leaf=here):
        if here(x):
            yield x
            yield from prune_states(x.inner)


def masked_updates(masks: PyTree, updates: PyTree, params: PyTree) -> PyTree:
    """Updates that take what is dropped to exactly 0 and leave the others."""
    # p + (-p) is exactly 0, in every dtype; and so in the wider of two.
    drop = lambda m, u, p: u if absent(m) else jnp.where(m, u, -p)
    return jax.tree.map(drop, masks, updates, params, is_leaf=absent)


def zeroed(masks: PyTree, grads: PyTree) -> PyTree:
    """Gradients as a model has them that lacks what is dropped."""
    zero = lambda m, g: g if absent(m) else jnp.where(m, g, 0)
    return jax.tree.map(zero, masks, grads, is_leaf=absent)


def absent(mask: Any) -> bool:
    """Whether there is no mask here: not covered, or not for this transform."""
    return mask is None or isinstance(mask, optax.MaskedNode)


@jax.custom_jvp
def _through(w: Array, keep: Array) -> Array:
    return jnp.where(keep, w, 0)


@_through.defjvp
def _through_jvp(primals, tangents):
    return _through(*primals), tangents[0]
