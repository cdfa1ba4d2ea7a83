"""Channels evened out without a change of the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import trace
from jaxeff.quantization import awq, equalize, int4, int8, quantize, smooth, w8a8
from jaxeff.quantization.rescale import moves
from tests.program.built import build, some

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
# Some channels are a hundred times as large as others.
SIZES = jnp.exp(jnp.linspace(-2.3, 2.3, 16))
PARAMS = {"g": SIZES * (1 + draw(16) / 10), "up": draw(16, 32), "down": draw(32, 8)}
X = draw(200, 16)


def block(params, x):
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["g"][None]
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def off(fn, params, new_fn, new):
    y = fn(params, X)
    return float(jnp.linalg.norm(new_fn(new, X) - y) / jnp.linalg.norm(y))


@pytest.mark.slow
@some("linen_gpt", "linen_llama", "nnx_transformer", "linen_mobilenet", "nnx_cnn")
@pytest.mark.parametrize("how", ["smooth", "equalize"])
def test_models_compute_the_same(case, how):
    model = build(case)
    params = jax.tree.map(jnp.asarray, model.params)
    args = jax.tree.map(jnp.asarray, model.args)
    if not moves(model.program):
        pytest.skip("no channel can be moved")
    if how == "smooth":
        fn, new = smooth(model.fn, params, *args, batches=[args])
    else:
        try:
            fn, new = equalize(model.fn, params, *args)
        except ValueError:
            pytest.skip("no two weights follow each other directly")
    assert fn is model.fn
    pairs = zip(*map(jax.tree.leaves, (new, params)), strict=True)
    changed = [not np.array_equal(a, b) for a, b in pairs]
    assert any(changed)
    y, z = (model.jitted(p, *args) for p in (params, new))
    assert float(jnp.linalg.norm((y - z).ravel()) / jnp.linalg.norm(y.ravel())) < 1e-4


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_vector_is_that_of_the_paper(strength):
    _, new = smooth(block, PARAMS, X, batches=[(X,)], only="up", strength=strength)
    s = np.asarray(PARAMS["g"] / new["g"])
    np.testing.assert_allclose(new["up"], PARAMS["up"] * s[:, None], rtol=1e-5)
    x = X * jax.lax.rsqrt((X**2).mean(-1, keepdims=True) + 1e-6) * PARAMS["g"][None]
    top, w = jnp.abs(x).max(0), jnp.abs(PARAMS["up"]).max(1)
    expected = top**strength / w ** (1 - strength)
    np.testing.assert_allclose(s / s[0], expected / expected[0], rtol=1e-4)


def test_after_smoothing_activations_are_rounded_better():
    plain = off(block, PARAMS, *quantize(block, PARAMS, X, formats={"{up,down}": w8a8}))
    fn, new = smooth(block, PARAMS, X, batches=[(X,)])
    q = quantize(fn, new, X, formats={"{up,down}": w8a8})
    assert off(block, PARAMS, *q) < 0.85 * plain


def test_equalised_channels_are_as_large_where_they_are_made_as_where_they_are_read():
    params = {**PARAMS, "down": PARAMS["down"] * jnp.exp(draw(32))[:, None]}
    _, new = equalize(block, params, X, only="down")
    made, read = jnp.abs(new["up"]).max(0), jnp.abs(new["down"]).max(1)
    np.testing.assert_allclose(made, read, rtol=1e-4)
    rough = int8.per_tensor()
    plain = quantize(block, params, X, formats={"{up,down}": rough})
    even = quantize(block, new, X, formats={"{up,down}": rough})
    assert off(block, params, *even) < 0.8 * off(block, params, *plain)


@pytest.mark.parametrize("fmt", [int4, int4.grouped(8)], ids=lambda f: f.name)
def test_room_for_large_inputs_makes_outputs_nearer(fmt):
    # Inputs of very different sizes, made by a norm whose scale can give way.
    formats = {"{up,down}": fmt}
    plain = quantize(block, PARAMS, X, formats=formats, fit="mse")
    ours = awq(block, PARAMS, X, formats=formats, batches=[(X,)])
    assert off(block, PARAMS, *ours) < 0.8 * off(block, PARAMS, *plain)


def test_what_cannot_be_is_one_clear_line():
    given = {"batches": [(X,)]}
    with pytest.raises(ValueError, match="a share, in .0, 1., got 2"):
        smooth(block, PARAMS, X, strength=2, **given)
    with pytest.raises(ValueError, match="1 power or more is tried, got 0"):
        awq(block, PARAMS, X, formats={"up": int4}, steps=0, **given)
    curved = lambda p, x: jax.nn.gelu(x @ p["up"]) @ p["down"]
    pair = {"up": draw(16, 32), "down": draw(32, 8)}
    assert not trace(curved, pair, X).scalings
    scaled = lambda *a: awq(*a, formats=int4, **given)
    for run in (lambda *a: smooth(*a, **given), equalize, scaled):
        with pytest.raises(ValueError, match="passes no factor on"):
            run(curved, pair, X)
