"""Rotated weights."""

import functools
import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import cost, lowrank, tree
from jaxeff.models import Llama, LlamaConfig
from jaxeff.program import dense, describe, is_leaf, lift_report, rebuild
from jaxeff.quantization import (
    gptq,
    int4,
    quantize,
    rotate,
    Rotated,
    unfitted,
    w4a8,
)
from jaxeff.quantization.rotate import factors, rotate_dim
from tests.quantization.problems import problem
from tests.zoo import draw

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_model_computes_the_same_whatever_is_done_to_it[False]",
    "test_factors_are_fitted_to_data_too",
    "test_activations_with_outliers_are_rounded_with_less_error",
}


@pytest.mark.parametrize("n", [1, 2, 8, 128, 256, 43, 172, 1000])
def test_rotations_are_orthogonal(n, normal):
    whole = np.ones((1, 1))
    for m in factors(n):
        whole = np.kron(whole, m)
    np.testing.assert_allclose(whole @ whole.T, np.eye(n), atol=1e-12)
    x, y = normal(3, n, 2), normal(3, n, 2)
    turn = lambda x, **k: rotate_dim(x, 1, 5, **k)
    np.testing.assert_allclose(turn(turn(x), back=True), x, atol=1e-5)
    dots = lambda x, y: jnp.einsum("ink,jnl->ijkl", x, y, precision="highest")
    np.testing.assert_allclose(dots(turn(x), turn(y)), dots(x, y), atol=1e-3)


def test_one_large_input_is_spread_over_all():
    x = jnp.zeros((1, 256)).at[0, 17].set(100.0)
    np.testing.assert_allclose(jnp.abs(rotate_dim(x, 1, 0)), 100 / 16, rtol=1e-5)


CONFIG = LlamaConfig(
    vocab_size=17, d_model=32, hidden=48, n_layers=2, n_heads=4, n_kv_heads=2
)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_computes_the_same_whatever_is_done_to_it(scan, getkey, tmp_path):
    model = Llama(CONFIG, scan=scan)
    tokens = jr.randint(getkey(), (2, 5), 0, 17)
    variables = draw(getkey(), jax.eval_shape(model.init, getkey(), tokens))
    fn, params = rotate(model.apply, variables, tokens)
    turned = [p for p, x in tree.paths(params, is_leaf).items() if is_leaf(x)]
    assert all(p.endswith("kernel") for p in turned) and turned
    assert all(e.native for e in lift_report(fn, params, tokens))
    want = model.apply(variables, tokens)
    np.testing.assert_allclose(fn(params, tokens), want, atol=2e-5)
    again, _ = rebuild(
        json.loads(json.dumps(describe(fn, params))), model.apply, variables
    )
    np.testing.assert_array_equal(again(params, tokens), fn(params, tokens))
    slope = lambda f, p: jax.grad(lambda t: f(t, tokens).sum())(p)
    ours, theirs = slope(fn, params), slope(model.apply, variables)
    norm = ours["params"]["norm"]["scale"], theirs["params"]["norm"]["scale"]
    np.testing.assert_allclose(*norm, rtol=1e-3, atol=1e-4)


def heads(params, x):
    """Sums over two dims, and over one of a weight that is seen in another form."""
    y = jnp.einsum("bnh,nhd->bd", x, params["out"])
    return y @ params["seen"].reshape(6, 20).T


def test_dims_that_are_summed_together_and_other_forms_of_a_weight(normal):
    params = {"out": normal(4, 8, 20), "seen": normal(3, 2, 20)}
    x = normal(5, 4, 8)
    fn, new = rotate(heads, params, x)
    assert new["out"].dims == (-3, -2) and new["seen"].dims == (-1,)
    np.testing.assert_allclose(fn(new, x), heads(params, x), atol=1e-4)
    for name, w in params.items():
        np.testing.assert_allclose(new[name].dense(), w, atol=1e-5)


def outliers(normal):
    """Inputs of which a few are much larger than the others, as in language models."""
    size = jnp.where(jnp.arange(128) % 40 == 3, 30.0, 1.0)
    return normal(64, 128) * size[None]


def test_activations_with_outliers_are_rounded_with_less_error(normal):
    w, x = normal(128, 64), outliers(normal)
    product = lambda p, x: x @ p["a"]
    given = {"formats": int4.with_activations("int4"), "batches": [(x,)]}

    def off(method, fn, params):
        q_fn, q = method(fn, params, x, **given)
        y = product({"a": w}, x)
        return float(jnp.linalg.norm(q_fn(q, x) - y) / jnp.linalg.norm(y)), q

    plain, _ = off(quantize, product, {"a": w})
    turned, q = off(quantize, *rotate(product, {"a": w}, x))
    assert turned < 0.8 * plain
    assert isinstance(q["a"], Rotated) and q["a"].w.format == "w4a4"
    # What is fitted to data sees the rotated data.
    nearest = functools.partial(quantize, fit="mse")
    turned, _ = off(nearest, *rotate(product, {"a": w}, x))
    fitted, q = off(gptq, *rotate(product, {"a": w}, x))
    assert fitted < 0.95 * turned and q["a"].w.format == "w4a4"
    assert not unfitted(*rotate(product, {"a": w}, x), x)


def test_factors_are_fitted_to_data_too(normal):
    params, x = {"a": normal(40, 32)}, problem(n=200)[1]
    product = lambda p, x: x @ p["a"]
    thin = lowrank.factorize(product, params, x, ranks=12)
    errors = []
    for method in (functools.partial(quantize, fit="mse"), gptq):
        fn, q = method(*thin, x, formats=int4, batches=[(x,)])
        y = thin[0](thin[1], x)
        errors.append(float(jnp.linalg.norm(fn(q, x) - y)))
        assert isinstance(q["a"], lowrank.Factored)
    assert errors[1] < 0.95 * errors[0]


def test_few_bits_that_are_rotated_are_tuned_and_rounded_once(normal):
    params, x = {"a": normal(256, 256)}, normal(5, 256)
    product = lambda p, x: x @ p["a"]
    fn, q = quantize(*rotate(product, params, x), x)
    fast = cost.tune_products(fn, q, x, repeats=1, max_seconds=0.01, progress=False)
    assert len(fast.measured) == 1
    np.testing.assert_allclose(fast(q, x), fn(q, x), rtol=1e-4, atol=1e-3)
    # In bfloat16 it is off by one rounding, however many factors it is made of.
    half = x.astype(jnp.bfloat16)
    exact = rotate_dim(half.astype(jnp.float32), 1, 0)
    np.testing.assert_array_equal(rotate_dim(half, 1, 0), exact.astype(jnp.bfloat16))
    assert rotate_dim(jnp.zeros((2, 0)), 1, 0).shape == (2, 0)


def test_rotated_and_in_few_bits_it_shrinks_where_it_is_not_rotated(normal):
    params, x = {"a": normal(16, 12)}, normal(5, 16)
    product = lambda p, x: x @ p["a"]
    fn, q = quantize(*rotate(product, params, x), x, formats=w4a8)
    kept = q["a"].keep(1, np.arange(12) < 6)
    np.testing.assert_allclose(kept.dense(), dense(q["a"])[:, :6], atol=1e-5)
    assert q["a"].keep(0, np.arange(16) < 8) is NotImplemented


def test_what_cannot_be_rotated_is_said(normal):
    params = {"table": normal(8, 4), "w": normal(4, 4), "bias": normal(4)}
    fn = lambda p, i: p["table"][i] @ p["w"] + p["bias"][None]
    ids = jnp.arange(3)
    _, new = rotate(fn, params, ids)
    assert [k for k, x in new.items() if is_leaf(x)] == ["w"]
    with pytest.raises(ValueError, match="rotates none of the 1 .* gather uses it"):
        rotate(fn, params, ids, only="table")
    with pytest.raises(ValueError, match="no product uses it"):
        rotate(fn, params, ids, only="bias")
    with pytest.raises(ValueError, match="compressed already: rotate first"):
        rotate(*quantize(fn, params, ids, formats={"w": int4}), ids, only="w")
