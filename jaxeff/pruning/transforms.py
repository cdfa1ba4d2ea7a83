"""Pruning while training, as gradient transformations.

The masks live in the optimizer state, so pruning works with any optax optimizer and
the model never learns that it is being pruned. `prune` wraps an optimizer, for only
there the gradients can be seen; `prune_by_magnitude` needs none and stands last in a
chain.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, PyTree

from jaxeff import tree

from .criteria import by_magnitude, Criterion
from .distributions import Distribution, uniform
from .masks import (
    check,
    choose_masks,
    cover,
    leaf_arrays,
    like,
    masked_updates,
    PruneState,
    Rule,
    zeroed,
)
from .patterns import Pattern, Unstructured
from .schedules import check_schedules, check_steps, final_sparsity, Schedules


def prune(
    inner: optax.GradientTransformation,
    schedule: Schedules,
    by: Criterion | None = None,
    *,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = uniform,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains with `inner` and sets the weights of least importance to exactly zero.

    The weights are ranked when the schedule rises, as they are before that step;
    between two rises the mask stays, and so do its zeros. `inner` sees what a model
    without the dropped weights would: gradients of the kept ones, zeros elsewhere.

    Laws: after step t exactly the fraction schedule(t) is dropped, counted as the
    distribution says, and is 0 in every dtype; the others get the very update that
    `inner` gives for those gradients; and while the schedule does not fall a dropped
    weight stays dropped.

    Args:
        inner: the optimizer.
        schedule: maps the step to the fraction to drop, in [0, 1); or several by
            pattern, where a weight follows the first that matches it.
        by: what makes a weight matter: `by_magnitude()` by default, `by_saliency()`,
            `by_random()`.
        only: patterns of the weights to prune, where there is one schedule. By
            default every floating-point array of two dims or more, which leaves out
            biases and the scales of norms, unless a scan stacks them.
        pattern: `Unstructured()` by default, `Blocks` or `NofM`.
        distribution: how many each weight loses of what those of its schedule lose
            together: `uniform`, `erdos_renyi`, `erk` or `global_ranking`.
        seed: of `by_random()`.

    Raises:
        ValueError: at `init`, where nothing is left to prune or the pattern does not
            fit; at `update`, where it is called without params.
    """
    by, pattern = by or by_magnitude(), pattern or Unstructured()
    inner = optax.with_extra_args_support(inner)

    check_schedules(schedule)

    def init(params):
        rules = cover(params, schedule, only)
        check(rules, params, pattern, final_sparsity)
        keep_all = {path: jnp.ones_like(w, bool) for path, w in covered(rules, params)}
        return PruneState(
            jnp.zeros([], jnp.int32),
            jnp.zeros(_form(schedule), jnp.float32),
            like(params, keep_all),
            {path: by.init(w) for path, w in covered(rules, params)},
            inner.init(params),
        )

    def update(updates, state, params=None, **extra):
        grads, params = updates, needed(params)
        rules = cover(params, schedule, only)
        rules, sparsity = at_step(rules, state.step, _form(schedule))
        memory = observe(by, state.memory, params, grads)

        def rank(mask):
            scores = score(by, memory, params, grads, seed_key(seed, state.step))
            kept = tree.paths(mask)
            chosen = choose_masks(
                rules, scores, pattern=pattern, distribution=distribution, kept=kept
            )
            return like(params, chosen)

        # Ranking every weight costs more than many a step: only where it is due.
        due = jnp.any(sparsity != state.sparsity)
        mask = jax.lax.cond(due, rank, lambda mask: mask, state.mask)
        updates, held = inner.update(zeroed(mask, grads), state.inner, params, **extra)
        updates = masked_updates(mask, updates, params)
        return updates, PruneState(state.step + 1, sparsity, mask, memory, held)

    return optax.GradientTransformationExtraArgs(init, update)


def prune_by_magnitude(
    schedule: Schedules,
    *,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = uniform,
) -> optax.GradientTransformationExtraArgs:
    """Sets the smallest weights of every leaf to exactly zero.

    Place it last in an `optax.chain`: it rewrites the final update. The optimizers
    before it see all gradients; otherwise it is `prune`, whose laws and arguments
    hold here.

    Source: Zhu & Gupta 2017, arXiv:1710.01878.
    """
    return prune(
        optax.identity(),
        schedule,
        by_magnitude(),
        only=only,
        pattern=pattern,
        distribution=distribution,
    )


def straight_through(
    inner: optax.GradientTransformation,
    schedule: Schedules,
    by: Criterion | None = None,
    *,
    every: int = 1,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = uniform,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains all weights with `inner` and keeps masks for the forward pass.

    The loss computes with `masked(params, opt_state)`, whose gradients reach dropped
    weights too, so one that grows comes back. Movement pruning is this with
    `by_movement()`. In the end `masked(params, opt_state)` is the pruned model.

    Law: the updates are those of `inner`.

    Args:
        inner: the optimizer.
        schedule, by, only, pattern, distribution, seed: as for `prune`.
        every: how many steps lie between two rankings of the weights, as they are
            after that step.

    Raises:
        ValueError: as for `prune`, or `every` is below 1.

    Source: Sanh et al. 2020, arXiv:2005.07683, section 4; with N:M groups Zhou et
        al. 2021, arXiv:2102.04010, section 3.
    """
    check_steps("every", every, least=1)
    by, pattern = by or by_magnitude(), pattern or Unstructured()
    whole = prune(inner, schedule, by, only=only, pattern=pattern)
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        grads, params = updates, needed(params)
        rules = cover(params, schedule, only)
        rules, sparsity = at_step(rules, state.step, _form(schedule))
        memory = observe(by, state.memory, params, grads)
        updates, held = inner.update(grads, state.inner, params, **extra)

        def rank(_):
            new = optax.apply_updates(params, updates)
            scores = score(by, memory, new, grads, seed_key(seed, state.step))
            chosen = choose_masks(
                rules, scores, pattern=pattern, distribution=distribution
            )
            return like(params, chosen)

        due = jnp.any(sparsity > 0) & (state.step % every == 0)
        due |= jnp.any(sparsity != state.sparsity)
        mask = jax.lax.cond(due, rank, lambda mask: mask, state.mask)
        return updates, PruneState(state.step + 1, sparsity, mask, memory, held)

    return optax.GradientTransformationExtraArgs(whole.init, update)


def fix_masks(masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """Keeps the weights that given masks drop at exactly zero.

    Place it last in an `optax.chain`. `init` copies the masks into the state.

    Args:
        masks: like params, True = kept; None where nothing is pruned.

    Raises:
        ValueError: at `init`, where a mask has another shape than its weight or none
            covers anything; at `update`, where it is called without params.
    """

    def init(params):
        given, weights = tree.paths(masks), tree.paths(params)
        wrong = [
            f"{n}{list(m.shape)}"
            for n, m in given.items()
            if n not in weights or jnp.shape(weights[n]) != m.shape
        ]
        if wrong or not given:
            raise ValueError(
                "a mask has the path and the shape of its weight, but params have no "
                f"{', '.join(wrong) or 'mask at all'}. Make it with `make_masks`."
            )
        if parts := sorted(leaf_arrays(params).intersection(given)):
            raise ValueError(
                f"compressed weights take no masks, but {', '.join(parts[:3])} are "
                "parts of such. Prune before compressing."
            )
        copies = {n: jnp.array(m, bool) for n, m in given.items()}
        kept = sum(jnp.sum(m, dtype=jnp.float32) for m in copies.values())
        sparsity = jnp.float32(1 - kept / sum(m.size for m in copies.values()))
        return PruneState(jnp.zeros([], jnp.int32), sparsity, like(params, copies))

    def update(updates, state, params=None, **_):
        updates = masked_updates(state.mask, updates, needed(params))
        return updates, state._replace(step=state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def covered(rules: list[Rule], params: PyTree) -> list[tuple[str, Array]]:
    """The weights that rules name, with their paths."""
    names = tree.paths(params)
    return [(path, names[path]) for rule in rules for path in rule.paths]


def at_step(
    rules: list[Rule], step: Array, form: tuple[int, ...]
) -> tuple[list[Rule], Array]:
    """The rules with sparsities in place of schedules, and those as one array."""
    now = [jnp.asarray(rule.value(step), jnp.float32) for rule in rules]
    sparsities = [Rule(r.paths, s) for r, s in zip(rules, now, strict=True)]
    return sparsities, jnp.stack(now).reshape(form)


def observe(by: Criterion, memory: Any, params: PyTree, grads: PyTree) -> Any:
    """What the criterion remembers after this step, by path."""
    weights, grads = tree.paths(params), tree.paths(grads)
    return {
        path: by.observe(m, weights[path], grads[path]) for path, m in memory.items()
    }


def score(
    by: Criterion, memory: Any, params: PyTree, grads: PyTree, key: Array
) -> dict[str, Array]:
    """The scores of the weights that the memory covers, by path."""
    weights, grads = tree.paths(params), tree.paths(grads)
    return {
        path: by.score(m, weights[path], grads[path], jr.fold_in(key, i))
        for i, (path, m) in enumerate(memory.items())
    }


def seed_key(seed: int, step: Array | int) -> Array:
    """Another key for every step."""
    return jr.fold_in(jr.key(seed), step)


def needed(params: PyTree | None) -> PyTree:
    """Params, or an error that says how to pass them."""
    if params is None:
        raise ValueError(
            "pruning ranks the weights themselves: "
            "call `tx.update(grads, state, params)`."
        )
    return params


def _form(schedule: Schedules) -> tuple[int, ...]:
    return (len(schedule),) if isinstance(schedule, Mapping) else ()
