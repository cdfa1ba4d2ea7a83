"""Channels evened out without a change of the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import trace
from jaxeff.quantization import (
    awq,
    equalize,
    fake_quantize,
    int4,
    int8,
    quantize,
    rotate,
    smooth,
    w8a8,
)
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


def chain(params, x):
    *before, last = [params[k] for k in sorted(params) if k.startswith("w")]
    for i, w in enumerate(before):
        x = jax.nn.relu(x @ w + params.get(f"bias{i}", jnp.zeros(w.shape[1]))[None])
    return x @ last


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_pairs_in_a_row_are_equalised_together(dtype):
    params = {f"w{i}": draw(16, 16) * jnp.exp(4 * draw(16))[None] for i in range(5)}
    # Only a bias makes this channel, so no range says how large it is.
    params["w0"] = params["w0"].at[:, 3].set(0)
    params["bias0"] = draw(16)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    fn, new = equalize(chain, params, X.astype(dtype))
    close = 0.01 + 2 * float(jnp.finfo(dtype).eps)
    for i in range(4):
        made = jnp.abs(new[f"w{i}"]).max(0).astype(jnp.float32)
        read = jnp.abs(new[f"w{i + 1}"]).max(1).astype(jnp.float32)
        used = made > 0
        np.testing.assert_allclose(made[used], read[used], rtol=close)
        assert used.sum() == (15 if i == 0 else 16)
    assert new["bias0"][3] == params["bias0"][3]
    # In float32, to tell the rounding of weights alone, which is done once.
    wide = lambda p: jax.tree.map(lambda w: w.astype(jnp.float32), p)
    y, z = chain(wide(params), X), chain(wide(new), X)
    assert jnp.linalg.norm(y - z) < 4 * jnp.finfo(dtype).eps * jnp.linalg.norm(y)


SCALED = {
    "smooth": lambda *a, **k: smooth(*a, batches=[(X,)], **k),
    "equalize": equalize,
    "awq": lambda *a: awq(*a, batches=[(X,)], formats={"{w2,w3}": int8}),
}
CHAIN = {f"w{i}": draw(16, 16) * jnp.exp(draw(16))[None] for i in range(4)}


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("codes", ["w0", "w1", "w3"])
def test_beside_quantized_weights_only_dense_ones_are_scaled(how, codes):
    before = quantize(chain, CHAIN, X, formats={codes: int8})
    (fn, params), same = before, jnp.array_equal
    _, new = SCALED[how](*before, X)
    assert off(fn, params, fn, new) < (2e-2 if how == "awq" else 1e-5)
    assert all(map(same, *map(jax.tree.leaves, (new[codes], params[codes]))))
    dense = [k for k in CHAIN if k != codes]
    assert how == "awq" or any(not same(new[k], params[k]) for k in dense)


EVERY = (quantize, rotate, fake_quantize)
CASES = [(how, by) for how in ("smooth", "equalize") for by in EVERY]


# Before it scales any, `awq` itself asks for weights that are not quantized.
@pytest.mark.parametrize("how, by", [*CASES, ("awq", rotate)])
def test_weights_that_are_compressed_already_are_named(how, by):
    fn, new = by(chain, CHAIN, X)
    with pytest.raises(ValueError, match="w0 .*already.* then rotate, then quantize"):
        SCALED[how](fn, new, X)


def test_one_that_is_asked_for_by_name_is_refused_by_name():
    fn, new = quantize(chain, CHAIN, X, formats={"w1": int8})
    for run in (SCALED["smooth"], equalize):
        with pytest.raises(ValueError, match="w1.*compressed already .int8.. Smooth"):
            run(fn, new, X, only=["w1", "w3"])
        _, only = run(fn, new, X, only="w3")
        assert jnp.array_equal(only["w0"], new["w0"])


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


@pytest.mark.parametrize("how", [smooth, equalize])
def test_shapes_of_weights_are_one_clear_line(how):
    given = {"batches": [(X,)]} if how is smooth else {}
    with pytest.raises(ValueError, match="needs the values of the weights, but down"):
        how(block, jax.eval_shape(lambda: PARAMS), X, **given)
