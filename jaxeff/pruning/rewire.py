"""Dynamic sparse training: a model that is sparse from the start and rewires itself.

Every so often each layer drops its least important weights and grows as many others,
so that the number of weights never changes. What grows starts at zero, with the
optimizer state of a new weight.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxeff import tree
from jaxeff.program import is_leaf

from .criteria import by_gradient, by_magnitude, by_random, Criterion
from .distributions import Distribution, erk
from .masks import (
    check,
    choose_masks,
    cover,
    like,
    masked_updates,
    PruneState,
    zeroed,
)
from .patterns import Pattern, Unstructured
from .ranking import FIRST, LAST, order_keys, smallest
from .schedules import check_sparsity, check_steps
from .transforms import covered, needed, observe, score, seed_key


def rewire(
    inner: optax.GradientTransformation,
    sparsity: float | int | Mapping[str, float | int],
    *,
    grow: Criterion,
    drop: Criterion | None = None,
    every: int,
    until: int,
    fraction: float | int = 0.3,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = erk,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse model with `inner`, and moves some of its weights now and then.

    It starts from random masks. At step t, a multiple of `every` between 0 and
    `until`, round(f * kept) weights go, with f = fraction / 2 * (1 + cos(pi * t /
    until)), and as many come, from all that did not stay. Start from
    `masked(params, tx.init(params))`, or the first gradients are of the dense model.

    Laws: each layer keeps its number of weights; dropped weights are exactly 0; what
    grows is 0 until the next step, and its optimizer state is that of `inner.init`;
    the others get the very update that `inner` gives for their gradients.

    Args:
        inner: the optimizer. What it keeps for each weight starts anew where the
            weight does: every array of its state with the shape of a weight, at the
            end of whose path the weight's own stands.
        sparsity: the fraction that is not there, in [0, 1); or several by pattern.
        grow, drop: the criteria: the largest scores grow, the smallest drop.
        every: how many steps lie between two changes; about 100 in the paper.
        until: the step from which nothing changes; 3/4 of all in the paper.
        fraction: of the kept weights, how many move at first, in (0, 1).
        only, pattern: as for `prune`.
        distribution: `erk`, `erdos_renyi` or `uniform`, not one by scores.
        seed: of the first masks, and of `by_random()`.

    Raises:
        ValueError: a number is out of range; at `init`, as for `prune`, or the state
            of the optimizer is compressed.

    Source: Evci et al. 2020, arXiv:1911.11134, algorithm 1. A departure: the step
        that moves weights still updates those that stay.
    """
    check_steps("every", every, least=1)
    check_steps("until", until, least=1)
    for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        check_sparsity("sparsity", value)
    if not 0 < fraction < 1:
        raise ValueError(
            "fraction is what part of the kept weights moves, in (0, 1), got "
            f"{fraction}. The paper takes 0.3."
        )
    drop, pattern = drop or by_magnitude(), pattern or Unstructured()
    inner = optax.with_extra_args_support(inner)

    def init(params):
        rules = cover(params, sparsity, only)
        check(rules, params, pattern, float)
        weights = dict(covered(rules, params))
        chance = score(
            by_random(), dict.fromkeys(weights, ()), params, params, seed_key(seed, 0)
        )
        masks = choose_masks(rules, chance, pattern=pattern, distribution=distribution)
        now = jnp.asarray([rule.value for rule in rules], jnp.float32)
        held = inner.init(params)
        if any(map(is_leaf, jax.tree.leaves(held, is_leaf=is_leaf))):
            raise ValueError(
                "what an optimizer keeps for a weight starts anew where the weight "
                "does, but this one keeps it compressed. Compress what comes out: "
                "compress_state(rewire(adam, ...))."
            )
        return PruneState(
            jnp.zeros([], jnp.int32),
            now if isinstance(sparsity, Mapping) else now[0],
            like(params, masks),
            {
                "drop": {path: drop.init(w) for path, w in weights.items()},
                "grow": {path: grow.init(w) for path, w in weights.items()},
            },
            held,
        )

    def update(updates, state, params=None, **extra):
        grads, params, step = updates, needed(params), state.step
        by = {"drop": drop, "grow": grow}
        memory = {
            name: observe(by[name], state.memory[name], params, grads) for name in by
        }

        def move(mask):
            key = seed_key(seed, step)
            scores = {n: score(by[n], memory[n], params, grads, key) for n in by}
            part = fraction / 2 * (1 + jnp.cos(math.pi * step / until))
            new = moved(tree.paths(mask), scores["drop"], scores["grow"], part, pattern)
            return like(params, new)

        due = (step % every == 0) & (step > 0) & (step < until)
        mask = jax.lax.cond(due, move, lambda mask: mask, state.mask)
        stay = jax.tree.map(jnp.logical_and, state.mask, mask)
        # Outside of the `cond`, which would copy the whole state at every step.
        fresh = inner.init(zeroed(stay, params))
        as_is = jax.tree.map(lambda m: m | ~due, stay)
        held = renewed(state.inner, fresh, as_is)
        updates, held = inner.update(zeroed(stay, grads), held, params, **extra)
        # What grows was 0 and is 0 after this step, as is what drops.
        updates = masked_updates(stay, updates, params)
        return updates, PruneState(step + 1, state.sparsity, mask, memory, held)

    return optax.GradientTransformationExtraArgs(init, update)


def rigl(
    inner: optax.GradientTransformation,
    sparsity: float | int | Mapping[str, float | int],
    *,
    every: int,
    until: int,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """RigL: the smallest weights drop, those with the largest gradients grow.

    Args:
        inner, sparsity, every, until: as for `rewire`.
        **options: the others of `rewire`, but for `grow` and `drop`.

    Source: Evci et al. 2020, arXiv:1911.11134.
    """
    return rewire(
        inner, sparsity, grow=by_gradient(), every=every, until=until, **options
    )


def sparse_evolution(
    inner: optax.GradientTransformation,
    sparsity: float | int | Mapping[str, float | int],
    *,
    every: int,
    until: int,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SET: the smallest weights drop, random ones grow.

    As `rewire` says, new weights start at zero and fewer move as time goes by, as in
    the comparison of the RigL paper; the paper of SET moves a constant fraction.

    Args:
        inner, sparsity, every, until: as for `rewire`.
        **options: the others of `rewire`, but for `grow` and `drop`.

    Source: Mocanu et al. 2018, arXiv:1707.04780, algorithm 1.
    """
    return rewire(
        inner, sparsity, grow=by_random(), every=every, until=until, **options
    )


def moved(
    masks: Mapping[str, Array],
    drop: Mapping[str, Array],
    grow: Mapping[str, Array],
    part: Array | float,
    pattern: Pattern,
) -> dict[str, Array]:
    """Masks of as many units as before, of which round(part * kept) may be others.

    Args:
        masks: by path.
        drop: scores; of what is kept the smallest go.
        grow: scores; of what is not there after that the largest come. A unit that
            just went may come back, and is then as if it had stayed.
        part: of the kept units, in [0, 1].
        pattern: what goes together.
    """
    names = list(masks)
    along = tuple(pattern.along(p, masks[p].shape) for p in names)
    on = [pattern.units(p, masks[p].astype(jnp.float32)) > 0 for p in names]
    kept = [
        jnp.sum(m, axis=dims, dtype=jnp.int32, keepdims=True)
        for m, dims in zip(on, along, strict=True)
    ]
    off = [
        math.prod(m.shape[d] for d in dims) - n
        for m, dims, n in zip(on, along, kept, strict=True)
    ]
    going = [jnp.round(part * n).astype(jnp.int32) for n in kept]
    keys = [
        jnp.where(m, order_keys(pattern.units(p, drop[p])), FIRST)
        for p, m in zip(names, on, strict=True)
    ]
    gone = smallest(keys, [a + b for a, b in zip(off, going, strict=True)], along)
    keys = [
        # Below LAST: a gradient that is nan does not outlive what stays.
        jnp.where(g, jnp.minimum(order_keys(pattern.units(p, grow[p])), LAST - 1), LAST)
        for p, g in zip(names, gone, strict=True)
    ]
    gone = smallest(keys, off, along)
    return {
        p: pattern.expand(p, ~g, masks[p].shape)
        for p, g in zip(names, gone, strict=True)
    }


def renewed(state: PyTree, fresh: PyTree, stay: PyTree) -> PyTree:
    """An optimizer state with the entries of weights that do not stay as in `fresh`.

    Entries of a weight are told by their path, which ends with that of the weight,
    and by its shape; where several weights' paths fit, the longest is meant. This
    holds for every state that is a tree of trees like params, nested and masked in
    whatever way. Sums over several weights (the factors of Adafactor) stay.
    """
    masks = dict(jax.tree_util.tree_leaves_with_path(stay))

    def renew(path, old, new):
        for i in range(len(path) + 1):  # the longest end first
            mask = masks.get(path[i:])
            if mask is not None:
                return jnp.where(mask, old, new) if mask.shape == old.shape else old
        return old

    return jax.tree_util.tree_map_with_path(renew, state, fresh)
