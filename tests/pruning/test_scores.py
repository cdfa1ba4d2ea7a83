"""Scores: what each says of models in which the answer is known."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import trace
from jaxeff.models import CNN, GPT
from jaxeff.pruning import (
    activation,
    fisher,
    geometric_median,
    lamp,
    magnitude,
    norm_scale,
    output_error,
    random,
    taylor,
)
from tests.zoo import draw

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_every_free_coupling_of_a_transformer_is_judged",
}


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


def weights(key):
    up, bias, down = jr.split(key, 3)
    return {
        "up": jr.normal(up, (3, 6)),
        "bias": jr.normal(bias, (6,)),
        "down": jr.normal(down, (6, 2)),
    }


def hidden(score, params, fn=mlp, x=None):
    """The scores of the only coupling that is free."""
    program = trace(fn, params, jnp.ones((1, 3)) if x is None else x)
    (free,) = program.couplings.free
    return score(program, params)[free.name]


def data(key, n=5):
    return [(x,) for x in jr.normal(key, (n, 4, 3))]


def loss(params, x):
    return jnp.sum(jnp.sin(mlp(params, x)))


EVERY = {
    "magnitude": lambda key: magnitude(),
    "lamp": lambda key: lamp(),
    "geometric median": lambda key: geometric_median(),
    "random": lambda key: random(),
    "taylor": lambda key: taylor(loss, data(key)),
    "fisher": lambda key: fisher(loss, data(key)),
    "output error": lambda key: output_error(data(key)),
    "activation": lambda key: activation(data(key)),
}


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_finite_and_not_negative(name, getkey):
    found = hidden(EVERY[name](getkey()), weights(getkey()))
    assert found.shape == (6,) and np.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize("name", [n for n in EVERY if n != "random"])
def test_scores_go_with_the_indices(name, getkey):
    params, score, order = weights(getkey()), EVERY[name], np.array([3, 0, 5, 1, 4, 2])
    other = {k: params[k][..., order] for k in ("up", "bias")}
    other["down"] = params["down"][order]
    key = getkey()
    found, moved = hidden(score(key), params), hidden(score(key), other)
    np.testing.assert_allclose(moved, found[order], rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["magnitude", "taylor", "fisher", "output error", "activation"]
)
def test_an_index_that_does_nothing_scores_nothing(name, getkey):
    params = weights(getkey())
    params = {**params, "up": params["up"].at[:, 2].set(0)}
    params["bias"] = params["bias"].at[2].set(0)
    params["down"] = params["down"].at[2].set(0)
    found = hidden(EVERY[name](getkey()), params)
    assert found[2] == 0 and found.sum() > 0


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_adds_up_to_the_norms_of_what_leaves(order, getkey):
    params = weights(getkey())
    # The bias multiplies nothing, so its size says nothing.
    expected = np.sum(np.abs(params["up"]) ** order, 0)
    expected += np.sum(np.abs(params["down"]) ** order, 1)
    np.testing.assert_allclose(hidden(magnitude(order), params), expected, rtol=1e-6)


def test_a_norm_of_order_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        magnitude(0)


def test_lamp_is_one_for_the_largest_and_ignores_units(getkey):
    params = weights(getkey())
    found, squares = hidden(lamp(), params), hidden(magnitude(), params)
    for i in range(6):
        at_least = squares[squares >= squares[i]].sum()
        np.testing.assert_allclose(found[i], squares[i] / at_least)
    assert found.max() == 1
    tripled = jax.tree.map(lambda w: 3 * w, params)
    np.testing.assert_allclose(hidden(lamp(), tripled), found, rtol=1e-5)


def test_the_geometric_median_finds_what_is_alike(getkey):
    params = weights(getkey())
    found = hidden(geometric_median(), params)
    up = np.asarray(params["up"])
    expected = [
        sum(np.linalg.norm(up[:, i] - up[:, j]) for j in range(6)) for i in range(6)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    center = params["up"].mean(1)
    params = {**params, "up": params["up"].at[:, 4].set(center)}
    assert hidden(geometric_median(), params).argmin() == 4


def test_the_scale_of_a_norm_judges_its_channels(getkey):
    model, x = CNN(stages=((4,), (6,)), classes=5), jnp.ones((1, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    program = trace(model.apply, params, x)
    found = norm_scale()(program, params)
    scales = [w for p, w in params["params"].items() if "norm" in p]
    gammas = {tuple(np.abs(np.asarray(w["scale"], float)).tolist()) for w in scales}
    free = {c.name for c in program.couplings.free}
    assert {tuple(found[n].tolist()) for n in free} == gammas


def test_layers_stacked_for_a_scan_have_a_scale_for_each_channel():
    def fn(p, x):
        step = lambda x, w: (x + (x @ w["up"] * w["scale"][None]) @ w["down"], None)
        return jax.lax.scan(step, x, p)[0]

    params = {
        "up": jnp.ones((2, 3, 5)),
        "scale": jnp.arange(10.0).reshape(2, 5),
        "down": jnp.ones((2, 5, 3)),
    }
    program = trace(fn, params, jnp.ones((1, 3)))
    assert program.scales == ["scale"]
    np.testing.assert_array_equal(
        hidden(norm_scale(), params, fn), params["scale"].sum(0)
    )


def test_taylor_is_the_squared_first_order_change_of_the_loss(getkey):
    params, batches = weights(getkey()), data(getkey())

    def gated(gate, x):
        return loss({**params, "down": params["down"] * gate[:, None]}, x)

    changes = [jax.grad(gated)(jnp.ones(6), x) ** 2 for (x,) in batches]
    found = hidden(taylor(loss, batches), params)
    np.testing.assert_allclose(found, np.mean(changes, 0), rtol=1e-3)


def test_fisher_is_half_of_the_squared_gradients_of_what_consumes_it(getkey):
    params, batches = weights(getkey()), data(getkey())
    grads = [jax.grad(loss)(params, x)["down"] for (x,) in batches]
    expected = sum((g * params["down"]) ** 2 for g in grads).sum(1) / (2 * len(grads))
    np.testing.assert_allclose(
        hidden(fisher(loss, batches), params), expected, rtol=1e-4
    )


def test_the_activation_is_what_flows_into_what_consumes_it(getkey):
    params, batches = weights(getkey()), data(getkey())
    hidden_of = lambda x: jax.nn.relu(x @ params["up"] + params["bias"][None])
    sizes = [np.mean(np.asarray(hidden_of(x)) ** 2, 0) for (x,) in batches]
    found = hidden(activation(batches), params)
    np.testing.assert_allclose(found, np.mean(sizes, 0), rtol=1e-4)


def test_the_output_error_is_what_it_says(getkey):
    params, batches = weights(getkey()), data(getkey(), 2)
    expected = np.zeros(6)
    for i, (x,) in itertools.product(range(6), batches):
        dense = mlp(params, x)
        off = mlp({**params, "down": params["down"].at[i].set(0)}, x) - dense
        expected[i] += (off**2).sum() / (dense**2).sum() / len(batches)
    np.testing.assert_allclose(
        hidden(output_error(batches), params), expected, rtol=1e-4
    )


@pytest.mark.parametrize(
    "make",
    [lambda b: taylor(loss, b), lambda b: fisher(loss, b), output_error, activation],
)
def test_without_data_there_is_no_score(make, getkey):
    with pytest.raises(ValueError, match="at least one batch"):
        hidden(make(iter([])), weights(getkey()))


def test_chance_is_the_same_for_the_same_seed(getkey):
    params = weights(getkey())
    one, same, other = (hidden(random(s), params) for s in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_every_free_coupling_of_a_transformer_is_judged(getkey):
    model, x = GPT(16, 8, 8, 1, 2), jnp.zeros((1, 4), int)
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    program = trace(model.apply, params, x)
    value = lambda p, x: jnp.sum(model.apply(p, x) ** 2)
    for score in (
        magnitude(),
        geometric_median(),
        taylor(value, [(x,)]),
        output_error([(x,)]),
    ):
        found = score(program, params)
        for c in program.couplings.free:
            assert found[c.name].shape == (c.size,)
