"""Weights with a thin product beside them that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import combine, partition, tree
from jaxeff.lowrank import adapt, Adapted, merge
from jaxeff.program import dense, describe, is_leaf, lift_report, rebuild
from jaxeff.quantization import int4, nf4, QArray, quantize
from tests.program.built import build, some

MODELS = ("linen_llama_scan_remat", "nnx_transformer", "nnx_cnn", "plain_transformer")


def off(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def disturbed(params):
    """The second factors are no longer zero."""
    key = jax.random.key(1)
    change = lambda path, x: (
        x + 0.05 * jax.random.normal(key, x.shape)
        if tree.path_name(path).endswith("delta/v")
        else x
    )
    return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.slow
@some(*MODELS)
@pytest.mark.parametrize("base", ["dense", "int4"])
def test_it_begins_as_the_model_and_computes_with_the_sum(case, base):
    model = build(case)
    params, args = (jax.tree.map(jnp.asarray, x) for x in (model.params, model.args))
    fn = model.fn
    if base == "int4":
        fn, params = quantize(fn, params, *args, formats=int4)
    new_fn, new = adapt(fn, params, *args, ranks=2, alpha=4)
    adapted = [
        x for x in jax.tree.leaves(new, is_leaf=is_leaf) if isinstance(x, Adapted)
    ]
    assert adapted and all(x.scale == 2.0 for x in adapted)
    assert all(isinstance(x.base, QArray) == (base == "int4") for x in adapted)
    assert all(e.native for e in lift_report(new_fn, new, *args))

    @jax.jit
    def run(params, new, moved):
        plain = fn(params, *args), new_fn(new, *args)
        return *plain, new_fn(moved, *args), model.fn(dense(moved), *args)

    before, same, after, expected = run(params, new, disturbed(new))
    assert off(same, before) < 1e-5
    assert off(after, expected) < 1e-4 < off(after, before)


def matmul(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def make(normal):
    return {"a": normal(16, 24) / 4, "b": normal(24, 8) / 4}, normal(200, 16)


@pytest.mark.parametrize("fmt", [None, int4, nf4.grouped(8)], ids=str)
def test_training_the_product_alone_learns_on_frozen_weights(fmt, normal):
    params, x = make(normal)
    target = matmul(params, x) + jnp.sin(x @ normal(16, 8) / 4)
    fn = matmul
    if fmt is not None:
        fn, params = quantize(matmul, params, x, formats=fmt)
    fn, params = adapt(fn, params, x, ranks={"*": 4})
    train, frozen = partition(params, "**/delta/**")
    assert len(jax.tree.leaves(train)) == 4
    tx = optax.adam(1e-2)
    loss = lambda t: jnp.mean((fn(combine(t, frozen), x) - target) ** 2)

    @jax.jit
    def step(t, state):
        updates, state = tx.update(jax.grad(loss)(t), state)
        return optax.apply_updates(t, updates), state

    first, state = loss(train), tx.init(train)
    for _ in range(200):
        train, state = step(train, state)
    assert loss(train) < 0.5 * first
    done = combine(train, frozen)
    same = jax.tree.map(np.array_equal, done["a"].base, params["a"].base)
    assert all(jax.tree.leaves(same))
    np.testing.assert_allclose(
        matmul(merge(done), x), fn(done, x), rtol=1e-3, atol=1e-4
    )


def test_shapes_will_do_and_it_is_saved_as_plain_data(normal):
    params, x = make(normal)
    fn, new = adapt(matmul, params, x, ranks={"a": 3}, key=jax.random.key(2))
    assert new["b"] is params["b"]
    _, shapes = adapt(matmul, jax.eval_shape(lambda: params), x, ranks={"a": 3})
    _, again = rebuild(describe(fn, new), matmul, params)
    for other in (shapes, again):
        assert jax.tree.structure(other) == jax.tree.structure(new)


def test_what_cannot_be_is_one_clear_line(normal):
    params, x = make(normal)
    params["bias"] = normal(8)
    fn = lambda p, x: matmul(p, x) + p["bias"][None]
    for ranks, message in (
        ({"a": 17}, "a is a 16 x 24 matrix, so its rank is 1 to 16, got 17"),
        ({"bias": 1}, "pattern 'bias' adapts none of the 1 weights"),
        ({"c": 1}, "matches none of the 3 weights"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(fn, params, x, ranks=ranks)
    with pytest.raises(ValueError, match="none of the weights is adapted"):
        merge(params)
