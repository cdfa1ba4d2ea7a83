"""Weights multiplied together, without a change of the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.lowrank import factorize
from jaxeff.program import scale_weights, trace
from jaxeff.quantization import int8, quantize
from tests.program.built import build, some, zoo
from tests.program.shrinking import distance

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)


def scaled(program, params, scaling, spread=1.0):
    by = jnp.asarray(np.exp(RNG.normal(size=scaling.size) * spread), jnp.float32)
    return scale_weights(params, program.couplings, scaling, by)


@some("linen_llama_scan_remat", "nnx_transformer", "equinox_cnn", "linen_mobilenet")
def test_no_scaling_changes_a_model(case):
    check(case)


@pytest.mark.slow
@zoo
def test_no_scaling_changes_any_model(case):
    check(case)


def check(case):
    model = build(case)
    new = model.params
    for scaling in model.program.scalings:
        new = scaled(model.program, new, scaling, 0.5)
    run = lambda params: model.jitted(params, *model.args)
    assert distance(run(new), run(model.params)) < 2e-4


def powers(fn, params, *args):
    """Of each scaling, by path (of weights with one dim in it)."""
    found = trace(fn, params, *args).scalings
    return [{path: e for (path, _), e in s.powers.items()} for s in found]


def test_a_pair_of_layers_with_relu_between_them_can_be_equalised():
    params = {"a": draw(6, 8), "bias": draw(8), "b": draw(8, 5)}
    relu = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]
    (found,) = powers(relu, params, draw(3, 6))
    sign = found["a"]
    assert found == {"a": sign, "bias": sign, "b": -sign}
    for f in (jax.nn.gelu, jnp.tanh, jax.nn.softmax, lambda x: jax.nn.relu(x) + 1):
        fn = lambda p, x, f=f: f(x @ p["a"] + p["bias"][None]) @ p["b"]
        assert powers(fn, params, draw(3, 6)) == []


def test_a_gate_passes_what_it_multiplies_and_holds_what_it_sees():
    params = {k: draw(6, 8) for k in ("gate", "up")} | {"down": draw(8, 6)}
    fn = lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    (found,) = powers(fn, params, draw(3, 6))
    assert set(found) == {"up", "down"} and found["up"] == -found["down"]


def test_the_scale_of_a_norm_goes_with_all_that_read_it():
    params = {"g": draw(8), "q": draw(8, 5), "k": draw(8, 7), "in": draw(6, 8)}

    def fn(p, x):
        x = x @ p["in"]
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["g"][None]
        return x @ p["q"], x @ p["k"]

    (found,) = powers(fn, params, draw(3, 6))
    assert set(found) == {"g", "q", "k"} and found["q"] == found["k"] == -found["g"]


def test_queries_and_keys_go_against_each_other():
    params = {k: draw(6, 2, 4) for k in "qkv"} | {"o": draw(2, 4, 6)}

    def fn(p, x):
        q, k, v = (jnp.einsum("sd,dhk->shk", x, p[n]) for n in "qkv")
        scores = jax.nn.softmax(jnp.einsum("shk,thk->hst", q, k))
        return jnp.einsum("hst,thk,hkd->sd", scores, v, p["o"])

    found = powers(fn, params, draw(5, 6))
    assert {frozenset(f) for f in found} >= {frozenset("qk"), frozenset("vo")}
    for f in found:
        assert sum(f.values()) == 0


def test_a_batch_norm_can_be_folded():
    params = {"w": draw(3, 3, 2, 4), "next": draw(4, 5)}
    params |= {k: draw(4) for k in ("mean", "gamma", "beta")} | {"var": jnp.ones(4)}

    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, var, gamma, beta = (
            p[k][None, None, None] for k in ("mean", "var", "gamma", "beta")
        )
        y = (y - mean) * jax.lax.rsqrt(var + 1e-5) * gamma + beta
        return jax.nn.relu(y) @ p["next"]

    found = [frozenset(f) for f in powers(fn, params, draw(2, 5, 5, 2))]
    assert frozenset({"w", "mean", "gamma"}) in found
    assert any("next" in f and "var" not in f for f in found)


def test_parts_of_a_fused_weight_have_scalings_of_their_own():
    params = {"qkv": draw(6, 12), "o": draw(4, 6)}

    def fn(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=1)
        return jax.nn.softmax(q @ k.T) @ v @ p["o"]

    program = trace(fn, params, draw(5, 6))
    # (Queries and keys share their dims, which the weight then has twice.)
    assert [len(s.powers) for s in program.scalings] == [2]
    x = draw(5, 6)
    for s in program.scalings:
        new = scaled(program, params, s)
        assert distance(fn(new, x), fn(params, x)) < 1e-4
        assert not np.allclose(new["qkv"], params["qkv"])


def test_what_is_concatenated_keeps_scalings_of_its_own():
    params = {"a": draw(6, 8), "b": draw(6, 3), "c": draw(11, 5)}
    fn = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], 1) @ p["c"]
    program, x = trace(fn, params, draw(3, 6)), draw(3, 6)
    assert [len(s.powers) for s in program.scalings] == [2, 2]
    for s in program.scalings:
        new = scaled(program, params, s)
        assert distance(fn(new, x), fn(params, x)) < 1e-4


def test_what_is_added_where_it_was_turned_is_refused():
    params = {"a": draw(6, 8), "b": draw(8, 5)}
    turned = lambda p, x: (lambda y: (y + y[:, ::-1]) @ p["b"])(x @ p["a"])
    halves = lambda y: jnp.concatenate([y[:, 4:], y[:, :4]], 1)
    swapped = lambda p, x: (lambda y: (y + halves(y)) @ p["b"])(x @ p["a"])
    for fn in (turned, swapped):
        program = trace(fn, params, draw(3, 6))
        x, new = draw(3, 6), params
        for s in program.scalings:
            new = scaled(program, new, s)
        assert distance(fn(new, x), fn(params, x)) < 1e-4


def test_integers_and_arrays_of_leaves_that_hold_codes_are_in_none():
    params = {"a": draw(6, 8), "b": draw(8, 7), "c": draw(7, 5)}
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    x = draw(3, 6)
    assert len(powers(fn, params, x)) == 2
    (found,) = powers(*quantize(fn, params, x, formats={"a": int8}), x)
    assert set(found) == {"b", "c"}
    whole = params | {"a": params["a"].astype(jnp.int32)}
    (found,) = powers(fn, whole, x)
    assert set(found) == {"b", "c"}


def test_the_factors_of_a_leaf_without_codes_have_scalings():
    params = {"a": draw(16, 16), "b": draw(16, 16)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    fn, params = factorize(fn, params, draw(3, 16), ranks=4)
    found = [set(f) for f in powers(fn, params, draw(3, 16))]
    assert {"a/u", "a/v"} in found and {"a/v", "b/u"} in found


def test_the_layers_of_a_scan_share_a_vector():
    params = {"up": draw(3, 6, 8), "down": draw(3, 8, 6)}
    fn = lambda p, x: jax.lax.scan(
        lambda x, p: (x + jax.nn.relu(x @ p["up"]) @ p["down"], None), x, p
    )[0]
    (found,) = powers(fn, params, draw(4, 6))
    assert set(found) == {"up", "down"} and found["up"] == -found["down"]


def test_a_weight_that_is_not_used_is_in_none():
    params = {"a": draw(6, 8), "b": draw(8, 5), "idle": draw(8)}
    fn = lambda p, x: x @ p["a"] @ p["b"]
    assert [set(f) for f in powers(fn, params, draw(3, 6))] == [{"a", "b"}]
