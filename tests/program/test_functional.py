"""A model object and its `fn, params` compute the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from flax import nnx

from jaxeff import functional, tree
from jaxeff.models import MLP

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.norm(self.layers[0](x))))


def test_an_nnx_module_is_a_function_of_a_plain_dict():
    model = Net(nnx.Rngs(0))
    model.eval()
    fn, params = functional(model)
    assert "layers/0/kernel" in tree.paths(params)
    assert jnp.array_equal(jax.jit(fn)(params, X), model(X))
    doubled = jax.tree.map(lambda w: 2 * w, params)
    assert not jnp.array_equal(fn(doubled, X), model(X))


def test_calling_it_leaves_the_nnx_module_as_it_was():
    model = Net(nnx.Rngs(0))  # in training mode it would update its statistics
    fn, params = functional(model)
    before = jax.tree.leaves(nnx.state(model))
    fn(params, X)
    assert all(map(jnp.array_equal, before, jax.tree.leaves(nnx.state(model))))


def test_an_equinox_module_keeps_what_is_no_array():
    model = eqx.nn.MLP(3, 2, 8, 2, activation=jnp.tanh, key=jr.key(0))
    fn, params = functional(model)
    assert "layers/0/weight" in tree.paths(params)
    assert jnp.array_equal(fn(params, X[0]), model(X[0]))
    grads = jax.grad(lambda p: fn(p, X[0]).sum())(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("model", [MLP(), 3, "a model"])
def test_what_is_no_model_object_is_refused(model):
    with pytest.raises(ValueError, match="callable|no array"):
        functional(model)
