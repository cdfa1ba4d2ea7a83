"""Scores of elements, and what they add up to over a coupling."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.program import trace
from jaxeff.pruning import magnitude


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


def weights(key):
    up, bias, down = jr.split(key, 3)
    return {
        "up": jr.normal(up, (3, 6)),
        "bias": jr.normal(bias, (6,)),
        "down": jr.normal(down, (6, 2)),
    }


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_adds_up_to_the_norms_of_what_leaves(order, getkey):
    params = weights(getkey())
    program = trace(mlp, params, jnp.ones((1, 3)))
    total = program.couplings.sums(magnitude(order)(program, params))
    (hidden,) = total.values()
    # The bias multiplies nothing, so its size says nothing.
    expected = np.sum(np.abs(params["up"]) ** order, 0)
    expected += np.sum(np.abs(params["down"]) ** order, 1)
    assert np.allclose(hidden, expected)


def test_magnitude_ignores_units(getkey):
    params = weights(getkey())
    program = trace(mlp, params, jnp.ones((1, 3)))
    order = lambda p: [
        np.argsort(v) for v in program.couplings.sums(magnitude()(program, p)).values()
    ]
    tripled = jax.tree.map(lambda w: 3 * w, params)
    assert all(map(np.array_equal, order(params), order(tripled)))


def test_a_norm_of_order_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        magnitude(0)
