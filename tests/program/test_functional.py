"""A model object as the pair that everything takes, with nothing lost on the way."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen as nn, nnx

from jaxeff import functional, trace, tree
from jaxeff.program import describe, rebuild, zero_indices
from tests.program.shrinking import distance, random_keep, shrunk

X = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(8, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.outer(self.drop(jax.nn.relu(self.norm(self.inner(x)))))


def evaluated():
    model = Net(nnx.Rngs(0))
    model.eval()
    return model


def test_an_nnx_model_is_called_with_its_weights():
    model = evaluated()
    fn, params = functional(model)
    assert np.array_equal(fn(params, X), model(X))
    assert np.array_equal(jax.jit(fn)(params, X), nnx.jit(lambda m, x: m(x))(model, X))


def test_its_paths_end_in_the_names_of_its_weights():
    _, params = functional(evaluated())
    names = list(tree.paths(params))
    assert {"inner/kernel", "inner/bias", "norm/scale", "norm/mean"} <= set(names)


def test_calling_changes_neither_the_model_nor_the_weights():
    model = evaluated()
    fn, params = functional(model)
    before = jax.tree.map(
        np.asarray, {k: params[k] for k in ("inner", "norm", "calls")}
    )
    fn(params, X)
    jax.jit(fn)(params, X)
    fn(jax.tree.map(lambda x: x, params), X)
    assert int(model.calls[...]) == 0
    after = {k: params[k] for k in before}
    assert jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, after)) == (
        jax.tree.map(lambda _: True, before)
    )


def test_other_weights_give_another_result_and_gradients():
    fn, params = functional(evaluated())
    other = {**params, "outer": jax.tree.map(lambda x: 2 * x, params["outer"])}
    assert distance(fn(other, X), 2 * fn(params, X)) < 1e-6
    train, frozen = tree.partition(params, "**/kernel")
    grads = jax.grad(lambda t: fn(tree.combine(t, frozen), X).sum())(train)
    assert set(tree.paths(grads)) == {"inner/kernel", "outer/kernel"}


def test_what_is_shrunk_is_masked():
    fn, params = functional(evaluated())
    couplings = trace(fn, params, X).couplings
    (hidden,) = couplings.free
    assert {p for p, _ in hidden.members} >= {"inner/kernel", "norm/mean", "norm/var"}
    keep = random_keep(couplings, np.random.default_rng(0))
    small_fn, small = shrunk(fn, params, couplings, keep)
    want = fn(zero_indices(params, couplings, keep), X)
    assert distance(small_fn(small, X), want) < 1e-6
    again, shapes = rebuild(describe(small_fn, small), fn, params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
    assert distance(again(small, X), small_fn(small, X)) == 0


def test_an_abstract_nnx_model_can_be_looked_at():
    fn, params = functional(nnx.eval_shape(evaluated))
    assert trace(fn, params, X).couplings.free


def test_an_equinox_model_is_called_with_its_weights():
    model = eqx.nn.MLP(5, 3, 8, 2, activation=jnp.tanh, key=jr.key(0))
    fn, params = functional(model)
    assert np.array_equal(fn(params, X[0]), model(X[0]))
    assert "layers/0/weight" in tree.paths(params)
    assert all(map(tree.is_array, jax.tree.leaves(params)))
    assert jax.vmap(fn, (None, 0))(params, X).shape == (2, 3)


def test_any_callable_pytree_is_a_model():
    @tree.pytree
    class Affine:
        w: jax.Array
        name: str = tree.static(default="text")

        def __call__(self, x, *, times=1):
            return x * self.w * times

    fn, params = functional(Affine(jnp.float32(3)))
    assert fn(params, 2.0, times=5) == 30


def test_what_is_no_model_is_an_error():
    with pytest.raises(ValueError, match="dict is not callable"):
        functional({"w": X})
    with pytest.raises(ValueError, match="a Linen module is the pair"):
        functional(nn.Dense(3))
    with pytest.raises(ValueError, match="holds no array"):
        functional(lambda x: x)
