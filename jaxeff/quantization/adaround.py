"""AdaRound on one matrix: learns for each weight whether it goes up or down.

The error of the outputs is a quadratic form of the weights' errors, so it is least
for a rounding that need not be the nearest. Each weight gets a number between its
two neighbours on the grid, which gradient descent moves; a growing penalty drives
it to one of the two.

Source: Nagel et al. 2020, arXiv:2004.10568, section 3. The data enter by x^T x alone
(its equation 13), which is exact for the squared error of a layer's outputs.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .grids import Grid, neighbours

# A stretched sigmoid reaches 0 and 1 (equation 23).
_LOW, _HIGH = -0.1, 1.1
_HIGHEST = jax.lax.Precision.HIGHEST
_FLAT = 0.2  # share of the steps without the penalty
_BEGIN, _END = 20.0, 2.0  # its exponent, annealed


@functools.partial(
    jax.jit, static_argnames=("grid", "steps", "learning_rate", "penalty")
)
def adaround_matrix(
    w: Float[Array, "rows cols"],
    h: Float[Array, "cols cols"],
    scale: Float[Array, "rows cols"],
    zero: Float[Array, "rows cols"] | None,
    *,
    grid: Grid,
    steps: int = 2000,
    learning_rate: float = 1e-2,
    penalty: float = 1.0,
) -> Float[Array, "rows cols"]:
    """The matrix with each weight at one of its two neighbours on the grid.

    Laws: every entry is a number of the grid times its scale, one of the two next to
    the weight; the squared error of `x @ w.T` is at most that of the nearest.

    Args:
        w: an output per row, an input per column.
        h: x^T x of the inputs, or any multiple of it.
        scale, zero: of each weight.
        grid: the numbers.
        steps: of Adam.
        learning_rate: of Adam.
        penalty: weight of what drives to one of the two, where 1 counts a weight
            halfway as much as the error of an average weight that is rounded to the
            nearest.
    """
    shift = 0.0 if zero is None else zero
    low, high = (scale * (n - shift) for n in neighbours(w / scale + shift, grid))
    width = high - low
    part = jnp.clip((w - low) / width, 0.0, 1.0)
    # Of columns that only zeros meet the error is 0 whatever they become.
    lost = lambda new: jnp.sum((d := new - w) * jnp.matmul(d, h, precision=_HIGHEST), 1)
    cost = lambda new: lost(new).sum()
    nearest = low + width * jnp.round(part)
    before = cost(nearest)
    unit = jnp.where(before > 0, w.size / jnp.where(before > 0, before, 1), 0)
    stretch = lambda v: jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)
    inside = jnp.clip((part - _LOW) / (_HIGH - _LOW), 1e-3, 1 - 1e-3)
    v = jnp.log(inside) - jnp.log1p(-inside)
    tx = optax.adam(learning_rate)

    def loss(v, done):
        up = stretch(v)
        sharp = _END + (_BEGIN - _END) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        halfway = jnp.sum(1 - jnp.abs(2 * up - 1) ** sharp)
        weight = jnp.where(done > 0, penalty, 0.0)
        return unit * cost(low + width * up) + weight * halfway

    def step(i, carry):
        v, state = carry
        done = jnp.maximum(0.0, (i / steps - _FLAT) / (1 - _FLAT))
        updates, state = tx.update(jax.grad(loss)(v, done), state)
        return optax.apply_updates(v, updates), state

    v, _ = jax.lax.fori_loop(0, steps, step, (v, tx.init(v)))
    learned = low + width * (stretch(v) >= 0.5)
    # Gradient descent promises nothing: where it lost, row by row, the nearest stays.
    better = lost(learned) <= lost(nearest)
    return jnp.where(better[:, None], learned, nearest)
