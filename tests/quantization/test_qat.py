"""Training with rounding in the loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import combine, partition, tree
from jaxeff.program import lift_report
from jaxeff.quantization import (
    Codebook,
    convert,
    fake_quantize,
    FakeQuantized,
    int2,
    int3,
    int4,
    int8,
    log4_sqrt2,
    QArray,
    quantize,
    uint4,
    w4a8,
    w8a8_fp8,
)
from jaxeff.quantization.qat import rounded

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_how_fast_a_range_trains_does_not_hang_on_the_batch",
    "test_activations_are_rounded_with_scales_that_train",
    "test_the_derivatives_are_those_of_the_paper",
}

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
PARAMS = {"a": draw(12, 16) / 3, "b": draw(16, 8) / 3}
X = draw(256, 12)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize(
    "fmt", [int8, int3, int4.grouped(4), log4_sqrt2], ids=lambda f: f.name
)
def test_it_begins_with_what_quantize_gives_and_converts_to_it(fmt):
    fn, p = fake_quantize(mlp, PARAMS, X, formats=fmt)
    q_fn, q = quantize(mlp, PARAMS, X, formats=fmt, fit="mse")
    assert all(isinstance(x, FakeQuantized) for x in p.values())
    assert all(e.native for e in lift_report(fn, p, X))
    new = convert(p)
    assert jax.tree.structure(new) == jax.tree.structure(q)
    for ours, theirs in zip(*map(jax.tree.leaves, (new, q)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name in PARAMS:
        np.testing.assert_array_equal(p[name].dense(), q[name].dense())


def test_the_derivatives_are_those_of_the_paper():
    grid, n = int3.grid, 20.0
    x, scale = jnp.linspace(-3, 3, 13), jnp.full((1,), 0.7)
    f = lambda x, s: rounded(x, s, grid, n)
    at = x / 0.7
    inside = np.abs(at) < 3
    dx = jax.vmap(jax.grad(lambda x: f(x[None], scale)[0]))(x)
    np.testing.assert_allclose(dx, inside, atol=1e-6)
    ds = jax.jacobian(f, 1)(x, scale)[:, 0]
    # Equation 3, times the scale of the gradient of section 2.2.
    expected = np.where(inside, np.round(at) - at, 3 * np.sign(at)) / np.sqrt(n * 3)
    np.testing.assert_allclose(ds, expected, atol=1e-5)


def test_a_scale_that_crosses_zero_goes_on_as_its_magnitude():
    _, p = fake_quantize(mlp, PARAMS, X, formats=int4)
    turned = jax.tree.map(
        lambda l: dataclasses.replace(l, scale=-l.scale),
        p,
        is_leaf=lambda l: isinstance(l, FakeQuantized),
    )
    for name in PARAMS:
        np.testing.assert_array_equal(turned[name].dense(), p[name].dense())
        np.testing.assert_array_equal(convert(turned)[name].dense(), p[name].dense())


def train(fn, params, target, steps=500):
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def step(train, frozen, state):
        loss = lambda t: jnp.mean((fn(combine(t, frozen), X) - target) ** 2)
        value, grads = jax.value_and_grad(loss)(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    train, frozen = partition(params)
    state = tx.init(train)
    for _ in range(steps):
        train, state, loss = step(train, frozen, state)
    return combine(train, frozen), float(loss)


@pytest.mark.parametrize(
    "fmt, left", [(int2, 0.5), (int3, 0.5), (int3.grouped(4), 0.75)], ids=str
)
def test_training_wins_back_most_of_what_rounding_lost(fmt, left):
    y = mlp(PARAMS, X)
    loss = lambda fn, p: float(jnp.mean((fn(p, X) - y) ** 2))
    before = loss(*quantize(mlp, PARAMS, X, formats=fmt, fit="mse"))
    fn, p = fake_quantize(mlp, PARAMS, X, formats=fmt)
    p, _ = train(fn, p, y)
    assert loss(fn, p) < left * before
    assert loss(fn, convert(p)) == pytest.approx(loss(fn, p), rel=1e-4)


def test_activations_are_rounded_with_scales_that_train():
    fmt = w4a8.with_activations("int4", range="mse")
    fn, p = fake_quantize(mlp, PARAMS, X, formats=fmt, batches=[(X,)])
    first = p["b"].x_scale
    p, _ = train(fn, p, mlp(PARAMS, X), steps=100)
    assert not np.allclose(p["b"].x_scale, first)
    q = convert(p)
    assert isinstance(q["b"], QArray) and q["b"].activations == "int4"
    np.testing.assert_allclose(fn(q, X), fn(p, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fmt", [w4a8, w4a8.grouped(4), w8a8_fp8.grouped(4)], ids=lambda f: f.name
)
def test_dynamic_activations_are_those_of_what_is_stored(fmt):
    fn, p = fake_quantize(mlp, PARAMS, X, formats=fmt)
    np.testing.assert_allclose(fn(convert(p), X), fn(p, X), rtol=1e-4, atol=1e-4)


def test_weights_that_are_cast_are_rounded_first_as_those_that_are_stored_are():
    half = lambda p, x: x @ p["a"].astype(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    fn, p = fake_quantize(half, {"a": PARAMS["a"]}, x, formats=int4)
    assert fn(p, x).dtype == jnp.bfloat16 and p["a"].dtype == jnp.float32
    cast = p["a"].astype(jnp.bfloat16)
    assert cast.dtype == cast.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast.dense(), convert(p)["a"].dense().astype(x.dtype))


def test_how_fast_a_range_trains_does_not_hang_on_the_batch():
    fmt = int4.with_activations("int4", range="minmax")
    fn, p = fake_quantize(mlp, PARAMS, X, formats=fmt, batches=[(X / 2,)])
    loss = lambda p, x: (fn(p, x) ** 2).mean()
    once, often = (jax.grad(loss)(p, x) for x in (X, jnp.tile(X, (4, 1))))
    for ours, theirs in zip(*map(jax.tree.leaves, (once, often)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_weight_that_training_lost_is_an_error():
    _, p = fake_quantize(mlp, PARAMS, X, formats=int4)
    w = p["b"].w.at[2].set(jnp.nan)
    with pytest.raises(ValueError, match="8 of the 128 numbers of b are NaN"):
        convert(p | {"b": dataclasses.replace(p["b"], w=w)})


def test_only_floats_train_and_an_optimizer_keeps_all_of_them():
    _, p = fake_quantize(mlp, PARAMS, X, formats={"a": int4, "b": None})
    train, _ = partition(p)
    assert sorted(tree.paths(train)) == ["a/scale", "a/w", "b"]


def test_what_cannot_be_trained_is_one_clear_line():
    for fmt in (uint4, Codebook(4)):
        with pytest.raises(ValueError, match="a is to be .* Choose a symmetric format"):
            fake_quantize(mlp, PARAMS, X, formats=fmt)
    with pytest.raises(ValueError, match="none of the weights is trained to be"):
        convert(PARAMS)
