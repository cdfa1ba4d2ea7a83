"""Penalties while training: their gradients, and what they do to a model."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff import trace
from jaxeff.models import GPT
from jaxeff.pruning import group_lasso, l1, magnitude
from tests.zoo import draw

X = jr.normal(jr.key(2), (16, 4))


def mlp(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


def weights():
    up, down = jr.split(jr.key(0))
    return {
        "up": jr.normal(up, (4, 8)),
        "bias": jnp.ones(8),
        "down": jr.normal(down, (8, 3)),
    }


def added(tx, params):
    zero = jax.tree.map(jnp.zeros_like, params)
    return jax.jit(tx.update)(zero, tx.init(params), params)[0]


def test_the_group_lasso_adds_the_gradient_of_its_penalty():
    params = weights()

    def penalty(p):
        squares = (p["up"] ** 2).sum(0) + (p["down"] ** 2).sum(1)
        return 0.1 * jnp.sqrt(7.0) * jnp.sqrt(squares).sum()

    got = added(group_lasso(trace(mlp, params, X), 0.1), params)
    expected = jax.grad(penalty)(params)
    for name in params:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
    # The same where a part of the weights trains, as `variables["params"]` does.
    whole = trace(lambda p, x: mlp(p["params"], x), {"params": params}, X)
    part = added(group_lasso(whole, 0.1), params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, part, got))


def test_the_group_lasso_follows_every_coupling_of_a_transformer(getkey):
    model, x = GPT(16, 8, 8, 1, 2), jnp.zeros((1, 4), int)
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    program = trace(model.apply, params, x)

    def penalty(p):
        total = 0.0
        flat = {s.path: _at(p, s.path) for s in program.sites}
        for c in program.couplings.free:
            squares, n = jnp.zeros(c.size), 0
            for path, w in flat.items():
                for d in range(w.ndim):
                    for name, index in program.couplings.occurrences(path, d):
                        if name == c.name:
                            others = tuple(i for i in range(w.ndim) if i != d)
                            line = (w**2).sum(others)
                            squares = squares + jnp.stack(
                                [line[index == i].sum() for i in range(c.size)]
                            )
                            n += w.size // w.shape[d] * int((index == 0).sum())
            total += jnp.sqrt(n) * jnp.sqrt(squares).sum()
        return total

    got = added(group_lasso(program, 1.0), params)
    expected = jax.jit(jax.grad(penalty))(params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, got, expected)


def _at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def test_l1_adds_the_sign_of_the_weights_it_is_on():
    params = weights()
    got = added(l1(0.1, only="{up,bias}"), params)
    np.testing.assert_allclose(got["up"], 0.1 * jnp.sign(params["up"]), rtol=1e-6)
    np.testing.assert_allclose(got["bias"], 0.1)
    assert not got["down"].any()


def test_training_with_it_makes_neurons_vanish_that_are_not_needed():
    """The teacher has two neurons; of the student's eight most go to nothing."""
    teacher = {k: w[..., :2] if k != "down" else w[:2] for k, w in weights().items()}
    program = trace(mlp, weights(), X)
    y = mlp(teacher, X)

    def train(tx):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: ((mlp(p, X) - y) ** 2).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(lambda w: 0.5 * w, weights())
        state = tx.init(params)
        for _ in range(600):
            params, state = step(params, state)
        (c,) = program.couplings.free
        sizes = np.sort(np.sqrt(magnitude()(program, params)[c.name]))
        return sizes / sizes.max()

    plain = train(optax.adam(1e-2))
    sparse = train(optax.chain(group_lasso(program, 3e-3), optax.adam(1e-2)))
    assert (sparse < 0.1).sum() >= 3 > (plain < 0.1).sum()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: group_lasso(trace(mlp, p, X), 0.1, only="x"), "Nearest"),
        (lambda p: group_lasso(trace(mlp, p, X), 0.1, only="up"), "says why"),
        (lambda p: added(l1(0.1, only="x"), p), "Nearest"),
        (lambda p: l1(0.1).update(p, optax.EmptyState()), "call `tx.update"),
        (
            lambda p: added(group_lasso(trace(mlp, p, X), 0.1), {"up": p["up"]}),
            "not among",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(weights())
