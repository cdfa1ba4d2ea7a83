"""What makes a weight matter: the numbers by which weights are ranked.

A criterion sees one weight array at a time: its values, its gradient, and what the
criterion remembers of the steps before. The larger its score, the rather a weight
stays. This module ranks nothing itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

Weights = Array  # of one entry of the tree
Memory = Array | tuple[()]


class Criterion(NamedTuple):
    """An importance criterion, as functions of one array of weights.

    Scores and memory are float32: a product of two float16 may be too small for it.

    Attributes:
        init: `init(w) -> memory`: an array like `w`, or `()` where none is kept.
        observe: `observe(memory, w, grad) -> memory`, called at every step.
        score: `score(memory, w, grad, key) -> array like w`, called when weights are
            ranked; `key` is another one for every array and step.
    """

    init: Callable[[Weights], Memory]
    observe: Callable[[Any, Weights, Weights], Memory]
    score: Callable[[Any, Weights, Weights, Any], Array]


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _f32(x: Array) -> Array:
    # Of a complex number the size counts, as it does for `abs`.
    return x if jnp.iscomplexobj(x) else x.astype(jnp.float32)


def by_magnitude() -> Criterion:
    """|w|. Source: Han et al. 2015, arXiv:1506.02626."""
    return Criterion(_nothing, _nothing, lambda m, w, g, key: jnp.abs(_f32(w)))


def by_gradient() -> Criterion:
    """|dL/dw|, with which RigL chooses what grows. arXiv:1911.11134, section 3."""
    return Criterion(_nothing, _nothing, lambda m, w, g, key: jnp.abs(_f32(g)))


def by_random() -> Criterion:
    """No reason: every choice is equally likely."""
    return Criterion(_nothing, _nothing, lambda m, w, g, key: jr.uniform(key, w.shape))


def by_saliency(decay: float | int = 0.0) -> Criterion:
    """|w dL/dw|: how much the loss changes, to first order, if the weight goes.

    At once, and ranked over all weights, this is SNIP where it prunes at step 0:
    `prune(inner, one_shot(0.9), by_saliency(), distribution=global_ranking)`.

    Args:
        decay: in [0, 1]. The score is s = decay * s + |w dL/dw| over the steps: 0 is
            that of the last batch alone, 1 the sum of all.

    Raises:
        ValueError: `decay` is outside [0, 1].

    Source: Molchanov et al. 2019, arXiv:1906.10771, section 3.1, whose square ranks
        alike; Lee et al. 2019 (SNIP), arXiv:1810.02340, section 4.1.
    """
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay is the fraction of the score that a step keeps, in [0, 1], got "
            f"{decay}. 0 forgets all, 1 nothing."
        )
    now = lambda w, g: jnp.abs(_f32(w) * _f32(g))
    if decay == 0:
        return Criterion(_nothing, _nothing, lambda m, w, g, key: now(w, g))
    return Criterion(
        lambda w: jnp.zeros_like(w, jnp.float32),
        lambda m, w, g: decay * m + now(w, g),
        lambda m, w, g, key: m,
    )


def by_movement() -> Criterion:
    """-w dL/dw, summed over the steps: weights that move away from zero stay.

    It needs gradients of dropped weights too, which change all the while: use it
    with `straight_through`.

    Source: Sanh et al. 2020, arXiv:2005.07683, section 4 (the learning rate of the
        scores only scales them).
    """
    return Criterion(
        lambda w: jnp.zeros_like(w, jnp.float32),
        lambda m, w, g: m - jnp.real(_f32(w) * jnp.conj(_f32(g))),
        lambda m, w, g, key: m,
    )
