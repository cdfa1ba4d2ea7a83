"""k-means with weights: the few vectors nearest to many.

Source: Lloyd 1982; weights by the curvature of the loss: Choi et al. 2016,
arXiv:1612.01543, section 3.2.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

_CHUNK = 4096  # vectors whose distances to all centres are held at a time


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def kmeans(
    x: Float[Array, "n dim"],
    weight: Float[Array, "n dim"],
    *,
    k: int,
    steps: int = 30,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "k dim"]:
    """Centres that make the weighted sum of squared distances to the nearest small.

    A centre that no vector is nearest to moves to the vector that is worst off.

    Args:
        x: vectors.
        weight: of each squared difference; not all zero.
        k: centres.
        steps: of Lloyd's algorithm.
        key: chooses the vectors to begin from. Single numbers begin from their
            quantiles and need none.
    """
    if x.shape[1] == 1:
        # The centres of the least error lie as densely as the cube root of what
        # counts (Panter & Dite 1951); here of the weights, not of the density.
        order = jnp.argsort(x[:, 0])
        passed = jnp.cumsum(jnp.cbrt(weight[order, 0]))
        at = jnp.searchsorted(passed, (jnp.arange(k) + 0.5) / k * passed[-1])
        centres = x[order[jnp.minimum(at, len(x) - 1)]]
    else:
        centres = _spread(x, weight, k, key if key is not None else jr.key(0))

    def step(_, centres):
        code, off = nearest(x, weight, centres)
        total = jnp.zeros_like(centres).at[code].add(weight * x)
        count = jnp.zeros_like(centres).at[code].add(weight)
        empty = jnp.zeros(k).at[code].add(1.0) == 0
        worst = x[jax.lax.top_k(off, min(k, len(x)))[1]]
        worst = jnp.resize(worst, centres.shape)[jnp.cumsum(empty) - 1]
        mean = jnp.where(count > 0, total / jnp.where(count > 0, count, 1), centres)
        return jnp.where(empty[:, None], worst, mean)

    return jax.lax.fori_loop(0, steps, step, centres)


def _spread(x: Array, weight: Array, k: int, key: Key[Array, ""]) -> Array:
    """Vectors far from each other: each is drawn by its distance to those before it.

    Source: Arthur & Vassilvitskii 2007, "k-means++", section 2.2.
    """
    off = lambda centre: jnp.sum(weight * (x - centre[None]) ** 2, axis=1)
    first = jr.choice(jr.fold_in(key, k), x, p=weight.sum(1) / weight.sum())

    def draw(i, carry):
        centres, least = carry
        # Where every vector is a centre already any of them will do.
        odds = jnp.log(jnp.where(least > 0, least, 1e-30 * (1 + least.max())))
        new = x[jr.categorical(jr.fold_in(key, i), odds)]
        return centres.at[i].set(new), jnp.minimum(least, off(new))

    start = (jnp.zeros((k, x.shape[1]), x.dtype).at[0].set(first), off(first))
    return jax.lax.fori_loop(1, k, draw, start)[0]


def nearest(
    x: Float[Array, "n dim"],
    weight: Float[Array, "n dim"],
    centres: Float[Array, "k dim"],
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """For each vector its nearest centre, and the weighted squared distance."""

    def one(pair):
        x, weight = pair
        off = jnp.sum(weight[None] * (x[None] - centres) ** 2, axis=1)
        code = jnp.argmin(off)
        return code.astype(jnp.int32), off[code]

    return jax.lax.map(one, (x, weight), batch_size=_CHUNK)
