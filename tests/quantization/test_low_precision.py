"""Training with products in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.program import describe, equations, rebuild
from jaxeff.quantization import fake_quantize, int8, low_precision, quantize
from jaxeff.quantization.grids import named
from jaxeff.quantization.low_precision import _codes
from tests.program.built import build, some

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_values_and_gradients_are_near[fp8-0.08]",
    "test_values_and_gradients_are_near[int8-0.03]",
    "test_rounding_by_chance_is_right_in_the_mean[int8]",
}

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
PARAMS = {"a": draw(12, 16) / 3, "b": draw(16, 8) / 3}
X = draw(64, 12)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def products(fn):
    """The dtypes of the operands and the result of each product."""
    found = (e for _, e, _ in equations(jax.make_jaxpr(fn)(PARAMS, X)))
    names = ("dot_general", "conv_general_dilated")
    return [
        [v.aval.dtype.name for v in (*e.invars, *e.outvars)]
        for e in found
        if e.primitive.name in names
    ]


def off(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


FORMATS = {
    "int8": ["int8", "int8", "int32"],
    "fp8": ["float8_e4m3fn", "float8_e4m3fn", "float32"],
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_product_forward_and_backward_is_of_8_bits(format):
    low = low_precision(mlp, format)
    loss = lambda p, x: (low(p, x) ** 2).sum()
    forward = products(low)
    assert forward == [FORMATS[format]] * 2
    both = products(jax.grad(loss, (0, 1)))
    assert len(both) == 6
    assert all("8" in name for types in both for name in types[:2])


@pytest.mark.parametrize("format, near", [("int8", 0.03), ("fp8", 0.08)])
def test_values_and_gradients_are_near(format, near):
    low = low_precision(mlp, format)
    grad = lambda fn: jax.grad(lambda p, x: (fn(p, x) ** 2).sum(), (0, 1))(PARAMS, X)
    assert off(low(PARAMS, X), mlp(PARAMS, X)) < near
    for ours, exact in zip(*map(jax.tree.leaves, (grad(low), grad(mlp))), strict=True):
        assert ours.dtype == exact.dtype and off(ours, exact) < 3 * near


@pytest.mark.parametrize("format, near", [("int8", 0.03), ("fp8", 0.08)])
def test_convolutions_have_gradients(format, near):
    numbers = ("NWC", "WIO", "NWC")
    fn = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (2,), "SAME", dimension_numbers=numbers
    )
    w, x = draw(3, 6, 8), draw(4, 10, 6)
    grad = lambda fn: jax.grad(lambda *a: jnp.sin(fn(*a)).sum(), (0, 1))(w, x)
    for ours, exact in zip(grad(low_precision(fn, format)), grad(fn), strict=True):
        assert off(ours, exact) < 3 * near


@pytest.mark.parametrize("grid", ["int8", "e5m2", "e4m3"])
def test_rounding_by_chance_is_right_in_the_mean(grid):
    x, grid = draw(40), named(grid)

    def once(key):
        codes, scale = _codes(x, grid, key)
        return grid.decode(codes).astype(jnp.float32) * scale

    many = jax.vmap(once)(jax.random.split(jax.random.key(0), 4000))
    spread = many.std(0) / np.sqrt(4000)
    assert np.all(np.abs(many.mean(0) - x) <= 5 * spread + 1e-6)
    assert len(np.unique(np.asarray(many[:, 0]))) <= 2


@pytest.mark.slow
@some("nnx_cnn", "linen_llama_scan_remat", "linen_mobilenet")
@pytest.mark.parametrize("format", FORMATS)
def test_models_run_in_it(case, format):
    model = build(case)
    args = jax.tree.map(jnp.asarray, model.args)
    params = jax.tree.map(jnp.asarray, model.params)
    low = jax.jit(low_precision(model.fn, format))
    assert off(low(params, *args), model.jitted(params, *args)) < 0.2


@pytest.mark.parametrize("format", FORMATS)
def test_training_in_it_learns(format):
    target = jnp.sin(X @ draw(12, 8))

    def train(fn):
        tx = optax.adam(1e-2)
        loss = lambda p: jnp.mean((fn(p, X) - target) ** 2)

        @jax.jit
        def step(p, state):
            updates, state = tx.update(jax.grad(loss)(p), state)
            return optax.apply_updates(p, updates), state

        p, state = PARAMS, tx.init(PARAMS)
        for _ in range(200):
            p, state = step(p, state)
        return float(loss(PARAMS)), float(jnp.mean((mlp(p, X) - target) ** 2))

    (before, exact), (_, low) = train(mlp), train(low_precision(mlp, format))
    assert low < exact + 0.1 * before < 0.5 * before


@pytest.mark.parametrize("format", FORMATS)
def test_weights_and_activations_of_16_bits_keep_their_dtype(format):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X))
    low = low_precision(mlp, format)
    grads = jax.grad(lambda p, x: (low(p, x).astype(jnp.float32) ** 2).sum())(*half)
    assert low(*half).dtype == grads["a"].dtype == jnp.bfloat16
    assert off(low(*half).astype(jnp.float32), mlp(PARAMS, X)) < 0.1


def test_only_what_is_named_is_rounded():
    low = low_precision(mlp, weights="a")
    types = products(low)
    assert types == [["int8", "int8", "int32"], ["float32"] * 3]


def test_it_is_saved_as_plain_data():
    low = low_precision(mlp, "fp8", weights=["a"])
    again, _ = rebuild(describe(low, PARAMS), mlp, PARAMS)
    assert again == low
    np.testing.assert_array_equal(again(PARAMS, X), low(PARAMS, X))


def test_what_cannot_be_is_one_clear_line():
    with pytest.raises(ValueError, match="one of int8, fp8, got 'int4'"):
        low_precision(mlp, "int4")
    with pytest.raises(ValueError, match="matches none of the 2 multiplied weights"):
        low_precision(mlp, weights="c")(PARAMS, X)


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_batch_has_no_outputs_and_no_gradient(format):
    low = low_precision(mlp, format)
    assert low(PARAMS, X[:0]).shape == (0, 8)
    grads = jax.grad(lambda p: low(p, X[:0]).sum())(PARAMS)
    assert all(jnp.array_equal(g, jnp.zeros_like(g)) for g in grads.values())


def test_weights_that_are_rounded_already_are_named():
    fn, new = fake_quantize(mlp, PARAMS, X, formats={"a": int8})
    # The dense ones still run in it.
    assert off(low_precision(fn)(new, X), fn(new, X)) < 0.05
    assert not np.array_equal(low_precision(fn)(new, X), fn(new, X))
    for patterns in ("a", ["b", "a"]):
        with pytest.raises(ValueError, match="a: it is compressed .*int8.. Give"):
            low_precision(fn, weights=patterns)(new, X)
    fn, new = fake_quantize(mlp, PARAMS, X)
    with pytest.raises(ValueError, match="a: it is .*; b: .* quantize afterwards"):
        low_precision(fn)(new, X)
    # Products with codes of integers are products.
    fn, new = quantize(mlp, PARAMS, X)
    assert off(low_precision(fn)(new, X), fn(new, X)) < 0.05
