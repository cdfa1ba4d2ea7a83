"""Quantization after and before the other techniques."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.lowrank import Factored, factorize
from jaxeff.program import dense, is_leaf, lift_report
from jaxeff.pruning import shrink
from jaxeff.quantization import int4, int8, QArray, quantize, report, w8a8
from tests.zoo import ZOO

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_factors_are_quantized_one_by_one[linen_llama_scan_remat]",
    "test_factors_are_quantized_one_by_one[plain_transformer]",
}

CASES = {c.name: c for c in ZOO}


def off(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


@pytest.mark.parametrize(
    "name", ["linen_llama_scan_remat", "nnx_cnn", "plain_transformer"]
)
def test_factors_are_quantized_one_by_one(name, getkey):
    fn, params, args = CASES[name].build(getkey())
    fn, low = factorize(fn, params, *args, ranks={"**": 0.4})
    lifted, q = quantize(fn, low, *args)
    leaves = tree.paths(q, is_leaf)
    factored = {k: x for k, x in leaves.items() if isinstance(x, Factored)}
    assert factored
    for x in factored.values():
        assert isinstance(x.u, QArray) and isinstance(x.v, QArray)
    assert all(e.native for e in lift_report(lifted, q, *args))

    @jax.jit
    def run(low, q):
        return fn(low, *args), fn(dense(q), *args), lifted(q, *args)

    y, rounded, ours = run(low, q)
    assert off(ours, rounded) < 1e-5
    assert off(rounded, y) < 0.05


def matmul(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def make(normal):
    return {"up": normal(16, 24), "down": normal(24, 12)}, normal(5, 16)


def test_a_pattern_names_a_factored_weight_or_one_of_its_factors(normal):
    params, x = make(normal)
    fn, low = factorize(matmul, params, x, ranks={"**": 4})
    _, q = quantize(fn, low, x, formats={"up/u": int4, "up": int8, "down/v": w8a8})
    assert (q["up"].u.bits, q["up"].v.bits) == (4, 8)
    assert q["down"].u is low["down"].u and q["down"].v.activations == "int8"
    rows = {r.path: r for r in report(fn, low, x, formats={"up": int4}).rows}
    assert rows["up/u"].bits == 4 + 32 / 16 and rows["up/v"].bits == 4 + 32 / 4
    assert rows["down/u"].stays and rows["down/v"].bits == 32
    with pytest.raises(ValueError, match="it is quantized already"):
        quantize(fn, q, x, formats={"up": int8})


def test_quantized_weights_are_left_alone_by_factoring(normal):
    params, x = make(normal)
    fn, q = quantize(matmul, params, x, formats={"up": int8})
    _, low = factorize(fn, q, x, ranks={"**": 4})
    assert low["up"] is q["up"] and isinstance(low["down"], Factored)


@pytest.mark.parametrize("fmt", [int8, int4.grouped(4), w8a8], ids=lambda f: f.name)
def test_shrinking_drops_the_integers_and_scales_of_what_goes(fmt, normal):
    params, x = make(normal)
    fn, q = quantize(matmul, params, x, formats={"**": fmt})
    small_fn, small = shrink(fn, q, x, keep=0.5)
    assert small["up"].shape == (16, 12) and small["down"].shape == (12, 12)
    assert tree.tree_bytes(small) < tree.tree_bytes(q)
    # Which channels stayed: those whose integers are still there.
    at = [
        int(np.flatnonzero((q["up"].dense() == column[:, None]).all(0))[0])
        for column in small["up"].dense().T
    ]
    np.testing.assert_array_equal(
        small["down"].dense(), q["down"].dense()[np.array(at)]
    )
    tolerance = 0.02 if fmt.activations else 1e-5
    assert off(small_fn(small, x), matmul(dense(small), x)) < tolerance


@pytest.mark.parametrize(
    "fmt", [int8, int8.grouped(4), int4, int4.grouped(3), w8a8], ids=lambda f: f.name
)
def test_parts_of_a_fused_weight_are_multiplied_as_integers(fmt, normal):
    params, x = {"qkv": normal(12, 33)}, normal(5, 12)

    def fn(p, x):
        q, kv = p["qkv"][:, :11], p["qkv"][:, 11:]
        k, v = jnp.split(kv, 2, axis=1)
        return x @ q + (x[:, 1::2] @ k[1::2]) * (x @ v)

    q_fn, q = quantize(fn, params, x, formats={"*": fmt})
    assert all(use.native for use in lift_report(q_fn, q, x))
    expected = fn(dense(q), x)
    tolerance = 0.05 if fmt is w8a8 else 1e-5
    assert jnp.abs(jax.jit(q_fn)(q, x) - expected).max() < tolerance * expected.max()


def test_shrunk_factored_and_quantized(getkey):
    fn, params, args = CASES["linen_cnn"].build(getkey())
    small_fn, small = shrink(fn, params, *args, keep=0.75)
    low_fn, low = factorize(small_fn, small, *args, ranks={"**/kernel": 0.4})
    q_fn, q = quantize(low_fn, low, *args, formats={"**/kernel": int8})
    sizes = [tree.tree_bytes(p) for p in (params, small, low, q)]
    assert sizes == sorted(sizes, reverse=True)

    @jax.jit
    def run(q):
        return q_fn(q, *args), small_fn(dense(q), *args)

    assert off(*run(q)) < 1e-5
