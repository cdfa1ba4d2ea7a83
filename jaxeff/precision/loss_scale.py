"""Dynamic loss scaling: keeps float16 gradients from underflowing to zero.

The loss is multiplied by a large number before `grad`, and the gradients divided by
it after. Where that overflows the step is skipped and the number halved; after a run
of good steps it is doubled again. bfloat16 has float32's range and needs none of it.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxeff.tree import pytree, static


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point array of the tree holds an inf or a nan."""
    arrays = [x for x in jax.tree.leaves(tree) if _is_float(x)]
    finite = [jnp.all(jnp.isfinite(x)) for x in arrays]
    return jnp.stack(finite).all() if finite else jnp.array(True)


@pytree
class DynamicLossScale:
    """The number a loss is multiplied by, and for how long it has been good.

    Laws: unscale(grad(scale(loss))) equals grad(loss), bit for bit, where nothing
    overflows and all three numbers are powers of two, as they are by default;
    minimum <= value <= maximum after every `adjust`.

    Attributes:
        value: to multiply by.
        good_steps: finite steps since the value last changed.
        period: it grows after so many of them.
        factor: by which it grows, and shrinks.
        minimum: below which it never shrinks.
        maximum: above which it never grows.

    Raises:
        ValueError: unless 0 < minimum <= value <= maximum, all finite, with
            factor > 1 and period >= 1.
    """

    value: Float[Array, ""] | float | int = 2.0**15
    good_steps: Int[Array, ""] | int = 0
    period: int = static(default=2000)
    factor: float | int = static(default=2.0)
    minimum: float | int = static(default=1.0)
    maximum: float | int = static(default=2.0**24)

    def __post_init__(self):
        given = isinstance(self.value, float | int)
        value = self.value if given else self.minimum  # an array may be traced
        if not 0 < self.minimum <= value <= self.maximum < math.inf:
            raise ValueError(
                f"a loss scale needs 0 < minimum <= value <= maximum, got minimum "
                f"{self.minimum}, value {value}, maximum {self.maximum}. "
                "Widen the bounds."
            )
        if not self.factor > 1 or self.period < 1:
            raise ValueError(
                f"a loss scale grows by factor > 1 after period >= 1 good steps, got "
                f"factor {self.factor}, period {self.period}. The usual values are 2 "
                "and 2000."
            )
        object.__setattr__(self, "value", jnp.asarray(self.value, jnp.float32))
        object.__setattr__(self, "good_steps", jnp.asarray(self.good_steps, jnp.int32))

    def scale(self, loss: Float[Array, "..."]) -> Float[Array, "..."]:
        """The loss in float32, multiplied; in float16 it would overflow."""
        return loss.astype(jnp.float32) * self.value

    def unscale(self, grads: PyTree) -> PyTree:
        """Gradients divided by the scale, each in its own dtype.

        Keep the weights in float32, as `autocast` does: their gradients then are
        float32 too, and what float16 could not hold arrives.
        """

        def leaf(g):
            if not _is_float(g):
                return g
            return (g.astype(jnp.float32) / self.value).astype(g.dtype)

        return jax.tree.map(leaf, grads)

    def adjust(self, finite: Bool[Array, ""]) -> "DynamicLossScale":
        """The scale of the next step, given whether all gradients were finite."""
        good = self.good_steps + 1
        grows = finite & (good >= self.period)
        factor = jnp.where(finite, jnp.where(grows, self.factor, 1), 1 / self.factor)
        value = jnp.clip(self.value * factor, self.minimum, self.maximum)
        good = jnp.where(finite & ~grows, good, 0)
        return dataclasses.replace(self, value=value, good_steps=good)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
