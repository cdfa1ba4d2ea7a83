"""Pruned weights stored without their zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import dense
from jaxeff.pruning import (
    BitmaskArray,
    BlockArray,
    compact,
    compact_report,
    NMArray,
    prune_magnitude,
)
from jaxeff.tree import tree_bytes
from tests.program.built import build, some
from tests.program.shrinking import distance

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.slow
@some("linen_llama_scan", "plain_cnn")
@pytest.mark.parametrize("sparsity", [0.75, "2:4"])
def test_a_pruned_model_is_smaller_and_computes_the_same(case, sparsity):
    model = build(case)
    fn, pruned = prune_magnitude(model.fn, model.params, *model.args, sparsity=sparsity)
    small_fn, small = compact(fn, pruned, *model.args)
    assert tree_bytes(small) < tree_bytes(pruned)
    same = jax.tree.map(np.array_equal, dense(small), pruned)
    assert all(jax.tree.leaves(same))
    got, want = jax.jit(small_fn)(small, *model.args), model.jitted(pruned, *model.args)
    assert distance(got, want) < 1e-4
    report = compact_report(fn, pruned, *model.args)
    assert report.bytes == tree_bytes(small)
    assert report.dense_bytes == tree_bytes(pruned)
    assert "of dense" in str(report) and "all weights" in str(report)


def use_all(p, x):
    return sum(jnp.sum(x @ w) for w in p.values() if w.ndim == 2)


X = draw(3, 32)


def weights():
    w = draw(32, 32)
    groups = jnp.argsort(jnp.argsort(jnp.abs(w).reshape(8, 4, 32), axis=1), axis=1)
    scattered = jnp.asarray(RNG.random((32, 32)) < 0.3)
    return {
        "full": w,
        "two_of_four": jnp.where(groups.reshape(32, 32) < 2, 0, w),
        "blocks": w.at[:16].set(0).at[16:, 16:].set(0),
        "scattered": jnp.where(scattered, w, 0),
        "bias": jnp.zeros(32),
    }


def test_each_weight_takes_its_smallest_format():
    params = weights()
    fn, small = compact(use_all, params, X)
    kinds = {name: type(w) for name, w in small.items()}
    assert kinds["two_of_four"] is NMArray and kinds["blocks"] is BlockArray
    assert kinds["scattered"] is BitmaskArray
    assert small["two_of_four"].format == "2:4" and small["two_of_four"].axis == -2
    assert small["full"] is params["full"] and small["bias"] is params["bias"]
    assert distance(fn(small, X), use_all(params, X)) < 1e-5


def test_the_report_says_what_stays_and_why():
    rows = {r.path: r for r in compact_report(use_all, weights(), X).rows}
    assert rows["full"].note == "it would be no smaller"
    assert "no product" in rows["bias"].note
    assert rows["blocks"].sparsity == 0.75
    assert rows["blocks"].bytes == 16 * 16 * 4 + 4
    assert rows["two_of_four"].bytes == rows["two_of_four"].dense_bytes * 17 // 32
    sines = compact_report(
        lambda p, x: x @ jnp.sin(p["blocks"]) @ p["blocks"], weights(), X
    )
    assert "runs dense: sin at" in str(sines)


def test_only_what_is_named_changes():
    params = weights()
    _, small = compact(use_all, params, X, only="blocks")
    assert small["scattered"] is params["scattered"]
    assert isinstance(small["blocks"], BlockArray)
    again, smaller = compact(use_all, small, X, only="**")
    assert smaller["blocks"] is small["blocks"]
    assert distance(again(smaller, X), use_all(params, X)) < 1e-5


def test_the_rows_of_a_look_up_lie_together():
    table = jnp.zeros((64, 8)).at[::7].set(draw(10, 8))
    fn, small = compact(lambda p, i: p["e"][i], {"e": table}, jnp.arange(3))
    assert tree_bytes(small) < 64 * 8 * 4 / 3
    assert np.array_equal(fn(small, jnp.array([7, 8, 63])), table[np.array([7, 8, 63])])


def test_nothing_to_gain_is_an_error():
    with pytest.raises(ValueError, match="no weight would be smaller.*w, is 0% zeros"):
        compact(lambda p, x: x @ p["w"], {"w": draw(32, 4)}, X)
