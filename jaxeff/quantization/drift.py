"""Weights for inputs that have drifted since earlier weights were rounded.

With x the inputs now and z those of the model as it was, `|z w^T - x v^T|` is least
for v = w z^T x (x^T x)^-1. Rounding v and not w, each weight makes up for the errors
of all before it, as far as its inputs can.

Source: Li et al. 2025, arXiv:2504.02692 (GPTAQ), section 3, which spreads the same
correction over the columns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxeff.program import gram

_HIGHEST = jax.lax.Precision.HIGHEST


def grams(
    x: Float[Array, "groups n cols"], before: Float[Array, "groups n cols"]
) -> tuple[Float[Array, "groups cols cols"], Float[Array, "groups cols cols"]]:
    """A statistic for `calibrate` with `compare`: x^T x, and z^T x."""
    mixed = jnp.einsum("gni,gnj->gij", before, x, precision=_HIGHEST)
    return gram(x), mixed


@functools.partial(jax.jit, static_argnames="damping")
def undrifted(
    w: Float[Array, "groups rows cols"],
    h: Float[Array, "groups cols cols"],
    mixed: Float[Array, "groups cols cols"],
    damping: float,
) -> Float[Array, "groups rows cols"]:
    """The weights that come nearest, from inputs now, to the outputs there were.

    Laws: without drift they are `w`; the error of the outputs is no larger than that
    of `w`.

    Args:
        w: an output per row, an input per column.
        h, mixed: what `grams` gives, summed over all data.
        damping: times the mean squared input is added to each squared input: what
            the data do not tell of stays as it is.
    """

    def one(w: Array, h: Array, mixed: Array) -> Array:
        mean = jnp.mean(jnp.diagonal(h))
        more = jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(len(h))
        # w plus a change: exact where nothing has drifted.
        change = jnp.matmul(w, mixed - h, precision=_HIGHEST)
        return w + jax.scipy.linalg.solve(h + more, change.T, assume_a="pos").T

    return jax.vmap(one)(w, h, mixed)
