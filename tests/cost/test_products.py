"""Products in the form that is fastest."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.cost import FastProducts, Latency, products, tune_products
from jaxeff.program import describe, lift, rebuild
from jaxeff.quantization import Codebook, int4, int8, quantize, w8a8

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_tuned_function_computes_the_same[128 outputs at a time]",
    "test_the_tuned_function_computes_the_same[in bfloat16 parts]",
}

PARAMS = {
    "in": jr.normal(jr.key(0), (32, 256)) / 6,
    "loop": jr.normal(jr.key(1), (3, 256, 256)) / 16,
    "out": jr.normal(jr.key(2), (256, 32)) / 16,
}
X = jr.normal(jr.key(3), (5, 32))


def model(params, x):
    """A product, three that are alike in a scan, and a product."""
    step = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(step, x @ params["in"], params["loop"])
    return x @ params["out"]


def tuned(fastest, fn, params, *args):
    """As if that form were the fastest, where there is it."""

    def measure(thunks, **options):
        of = lambda name: 0.5 if name == fastest else 1.0
        return {name: Latency(of(name), of(name), of(name), 1) for name in thunks}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "measure_latency", measure)
        return tune_products(fn, params, *args, progress=False)


FORMS = [
    pytest.param("decoded first", marks=pytest.mark.slow),
    "in bfloat16 parts",
    pytest.param("byte by byte", marks=pytest.mark.slow),
    "128 outputs at a time",
    pytest.param("32 inputs at a time", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_tuned_function_computes_the_same(form):
    fn, params = quantize(model, PARAMS, X, formats=int4)
    fast = tuned(form, fn, params, X)
    assert {m.form for m in fast.measured if m.form != products.AS_IT_IS} == {form}
    want = fn(params, X)
    np.testing.assert_allclose(jax.jit(fast)(params, X), want, rtol=1e-4, atol=1e-5)
    # Another number of rows runs as it is.
    more = jnp.concatenate([X, X])
    np.testing.assert_array_equal(fast(params, more), fn(params, more))
    slope = lambda f: jax.grad(lambda x: f(params, x).sum())(X)
    np.testing.assert_allclose(slope(fast), slope(fn), rtol=1e-4, atol=1e-5)


def test_the_chosen_form_is_what_runs():
    fn, params = quantize(model, PARAMS, X, formats=int8)
    fast = tuned("128 outputs at a time", fn, params, X)
    loops = lambda f: str(jax.make_jaxpr(f)(params, X)).count("scan[")
    assert loops(fn) == 1 and loops(fast) > 1


def test_products_that_are_alike_are_measured_once_and_counted():
    fn, params = quantize(model, PARAMS, X, formats=int8)
    fast = tune_products(fn, params, X, repeats=3, max_seconds=0.05, progress=False)
    assert [m.count for m in fast.measured] == [1, 1, 1]
    text = str(fast)
    assert "float32 5x256 by int8 256x256" in text and "us dense" in text
    assert all(s > 0 for m in fast.measured for s in m.seconds.values())
    twice = lambda p, x: model(p, x) + model(p, 2 * x)
    fn, params = quantize(twice, PARAMS, X, formats=int8)
    fast = tuned("decoded first", fn, params, X)
    assert [m.count for m in fast.measured] == [2, 2, 2]


def test_what_is_only_a_little_faster_is_not_taken():
    fn, params = quantize(model, PARAMS, X, formats=int8)

    def measure(thunks, **options):
        of = lambda name: 0.95 if name == "decoded first" else 1.0
        return {name: Latency(of(name), of(name), of(name), 1) for name in thunks}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "measure_latency", measure)
        assert tune_products(fn, params, X, progress=False).forms == ()


def test_it_is_saved_with_the_model():
    fn, params = quantize(model, PARAMS, X, formats=int8)
    fast = tuned("decoded first", fn, params, X)
    about = json.loads(json.dumps(describe(fast, params)))
    again, _ = rebuild(about, model, PARAMS)
    assert isinstance(again, FastProducts) and again.forms == fast.forms
    assert dataclasses.replace(fast, measured=()) == again
    np.testing.assert_array_equal(again(params, X), fast(params, X))
    assert lift(again) is again
    assert "decoded first" in str(again)  # what runs is known, its times are not
    # Dense weights run as the model's own function.
    np.testing.assert_array_equal(again(PARAMS, X), model(PARAMS, X))


@pytest.mark.parametrize("fmt", [None, w8a8, Codebook(4)], ids=str)
def test_a_function_without_such_products_is_an_error(fmt):
    fn, params = (model, PARAMS)
    if fmt is not None:
        fn, params = quantize(model, PARAMS, X, formats=fmt)
    with pytest.raises(ValueError, match="the function has none. Use it as it is."):
        tune_products(fn, params, X)
