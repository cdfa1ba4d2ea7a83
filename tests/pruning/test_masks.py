import functools
import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from jaxeff.pruning import (
    apply_masks,
    by_saliency,
    fix_masks,
    keep_largest,
    make_masks,
    masked,
    one_shot,
    polynomial,
    prune,
    prune_by_magnitude,
    rigl,
    straight_through,
    uniform,
)
from jaxeff.quantization import int8, quantize
from jaxeff.tree import combine, partition

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def example(key, dtype=jnp.float32):
    shapes = {"kernel": (6, 5), "bias": (5,), "deep": {"kernel": (2, 3, 4)}}
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jr.split(key, len(leaves))
    arrays = [jr.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@given(k=st.integers(0, 100), c=st.floats(1e-2, 1e2))
def test_mask_drops_exactly_k_and_ignores_units(k, c):
    w = jr.normal(jr.key(0), (10, 10))
    mask = keep_largest(w, k / 100)
    assert jnp.sum(~mask) == k
    assert jnp.array_equal(mask, keep_largest(c * w, k / 100))


@given(
    w=st.sampled_from([1, 7, 40]).flatmap(  # each size is compiled
        lambda n: st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    ),
    sparsity=st.floats(0, 1, width=32),
)
def test_nothing_that_is_kept_is_smaller_than_anything_dropped(w, sparsity):
    """Many ties: of equals those that come first go, and no more than asked for."""
    w = jnp.array(w, jnp.float32)
    mask = np.asarray(keep_largest(w, sparsity))
    drop = int(np.round(np.float32(sparsity) * np.float32(w.size)))
    order = np.argsort(np.abs(np.asarray(w)), kind="stable")
    assert np.sum(~mask) == drop
    assert set(np.flatnonzero(~mask)) == set(order[:drop])


@given(
    w=st.lists(st.integers(-1, 1), min_size=20, max_size=20),
    first=st.floats(0, 1, width=32),
    second=st.floats(0, 1, width=32),
)
def test_what_was_dropped_stays_dropped_even_among_zeros(w, first, second):
    w = jnp.array(w, jnp.float32)
    before = keep_largest(w, min(first, second))
    after = keep_largest(jnp.where(before, w, 0), max(first, second), before)
    assert not jnp.any(after & ~before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update_dtype", DTYPES)
def test_dropped_weights_are_exactly_zero_in_every_dtype(dtype, update_dtype, getkey):
    params = example(getkey(), dtype)
    grads = example(getkey(), update_dtype)
    tx = prune_by_magnitude(one_shot(0.5))
    new, state = step(tx, params, tx.init(params), grads)
    for path in ("kernel", "deep"):
        for p, m in zip(
            jax.tree.leaves(new[path]), jax.tree.leaves(state.mask[path]), strict=True
        ):
            assert p.dtype == dtype
            # A kept one may be zero too, where its update is its negative.
            assert jnp.all((p == 0) | m)
            assert jnp.sum(~m) == round(0.5 * m.size)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.MultiSteps(optax.adam(1e-2), 2),
    ],
    ids=["momentum", "adamw", "clip_lion", "accumulate"],
)
def test_it_chains_with_any_optimizer_and_leaves_what_it_keeps_alone(optimizer, getkey):
    params, grads = example(getkey()), [example(getkey()) for _ in range(6)]
    tx = optax.chain(optimizer, prune_by_magnitude(one_shot(0.4, 2)))
    pruned = params
    state, plain_state = tx.init(params), optimizer.init(params)
    for t, g in enumerate(grads):
        expected, plain_state = step(optimizer, pruned, plain_state, g)
        pruned, state = step(tx, pruned, state, g)
        mask = state[1].mask
        for p, e, m in zip(
            jax.tree.leaves(pruned),
            jax.tree.leaves(expected),
            jax.tree.leaves(mask, is_leaf=lambda x: x is None),
            strict=True,
        ):
            kept = True if m is None else m
            # Two programs: they may fuse, and so round, in different ways.
            assert jnp.allclose(p, jnp.where(kept, e, 0), rtol=1e-5, atol=1e-6)
            assert m is None or jnp.all(p[~m] == 0)
            if m is not None:
                assert jnp.sum(~m) == (round(0.4 * m.size) if t >= 2 else 0)


def test_masks_only_grow_and_stay_between_two_rises(getkey):
    schedule = polynomial(0.2, 0.8, begin=2, steps=12, every=4)
    tx = optax.chain(optax.sgd(0.3), prune_by_magnitude(schedule))
    params = example(getkey())
    state, masks = tx.init(params), []
    for t in range(20):
        params, state = step(tx, params, state, example(getkey()))
        masks.append(state[1].mask["kernel"])
        assert state[1].sparsity == pytest.approx(float(schedule(t)), abs=1e-6)
        assert jnp.sum(~masks[-1]) == round(float(schedule(t)) * 30)
    for t, (before, after) in enumerate(zip(masks, masks[1:], strict=False)):
        assert not jnp.any(after & ~before)
        rises = schedule(t + 1) != schedule(t)
        assert jnp.array_equal(before, after) == (not rises)


def test_biases_and_integers_are_left_alone_by_default(getkey):
    params = {**example(getkey()), "table": jnp.arange(6).reshape(2, 3)}
    state = prune_by_magnitude(one_shot(0.5)).init(params)
    assert state.mask["bias"] is None and state.mask["table"] is None
    assert state.mask["kernel"].shape == (6, 5)


def test_only_the_weights_that_a_pattern_names_are_pruned(getkey):
    params = example(getkey())
    tx = prune_by_magnitude(one_shot(0.5), only=["deep/*", "bias"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = step(tx, params, tx.init(params), zeros)
    assert jnp.array_equal(new["kernel"], params["kernel"])
    assert jnp.sum(new["bias"] == 0) == 2  # 2.5 rounds to even
    assert jnp.sum(new["deep"]["kernel"] == 0) == 12


def test_frozen_weights_may_be_absent(getkey):
    params = example(getkey())
    train, frozen = partition(params, "**/kernel")
    tx = optax.chain(optax.adam(1e-2), prune_by_magnitude(one_shot(0.5)))
    grads = jax.tree.map(jnp.ones_like, train)
    train, state = step(tx, train, tx.init(train), grads)
    assert train["bias"] is None and state[1].mask["bias"] is None
    new = combine(train, frozen)
    assert jnp.array_equal(new["bias"], params["bias"])
    assert jnp.sum(new["kernel"] == 0) == 15


def test_it_runs_in_a_scan_as_step_by_step_and_with_donated_buffers(getkey):
    params = example(getkey())
    tx = optax.chain(
        optax.adam(3e-2),
        prune_by_magnitude(polynomial(0, 0.7, begin=1, steps=4, every=2)),
    )
    grads = [example(getkey()) for _ in range(8)]

    def turn(carry, g):
        return step(tx, *carry, g), None

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    first = (params, tx.init(params))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(turn, c, stacked))(first)

    donating = jax.jit(lambda c, g: turn(c, g)[0], donate_argnums=0)
    carry = jax.tree.map(jnp.copy, first)
    for g in grads:
        before, carry = carry, donating(carry, g)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert jax.tree.structure(scanned) == jax.tree.structure(carry)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(carry), strict=True):
        assert a.dtype == b.dtype and jnp.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert jnp.sum(carry[0]["kernel"] == 0) == 21


def test_it_needs_the_weights(getkey):
    params = example(getkey())
    tx = prune_by_magnitude(one_shot(0.5))
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_a_rule_that_prunes_nothing_is_refused(getkey):
    params = example(getkey())
    with pytest.raises(ValueError, match="matches none of the 3 weights.*deep/kernel"):
        prune_by_magnitude(one_shot(0.5), only="deep/kernal").init(params)
    with pytest.raises(ValueError, match=r"nothing to prune.*bias\[5\].*`only=`"):
        prune_by_magnitude(one_shot(0.5)).init({"bias": params["bias"]})
    with pytest.raises(ValueError, match="nothing to prune.*'n'"):
        prune_by_magnitude(one_shot(0.5), only="n").init({"n": jnp.arange(3)})


def test_masks_of_a_tree_are_those_of_its_leaves_and_never_bring_back(getkey):
    params = example(getkey())
    scores = jax.tree.map(jnp.abs, params)
    first = make_masks(scores, {"deep/*": 0.25, "kernel": 0.4})
    assert first["bias"] is None
    assert jnp.array_equal(first["kernel"], keep_largest(params["kernel"], 0.4))
    assert jnp.sum(~first["deep"]["kernel"]) == 6
    left = apply_masks(params, first)
    assert jnp.array_equal(left["kernel"] != 0, first["kernel"])
    assert jnp.array_equal(left["bias"], params["bias"])
    other = jax.tree.map(jnp.abs, example(getkey()))
    second = make_masks(other, 0.5, kept=first)
    for path in ("kernel", "deep"):
        old, new = jax.tree.leaves(first[path])[0], jax.tree.leaves(second[path])[0]
        assert not jnp.any(new & ~old) and jnp.sum(~new) == new.size // 2
    both = make_masks(other, 0.5, kept={**first, "kernel": None})
    assert jnp.array_equal(both["kernel"], make_masks(other, 0.5)["kernel"])
    assert jnp.array_equal(both["deep"]["kernel"], second["deep"]["kernel"])
    with pytest.raises(ValueError, match=r"sparsity .* in \[0, 1\), got 1"):
        make_masks(scores, 1)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 90.* write 0.8"):
        keep_largest(params["kernel"], 90)
    with pytest.raises(ValueError, match="nothing to prune.*left for 'n'"):
        make_masks({"n": jnp.arange(3)}, {"n": 0.5})


def quantized_example(key):
    params = example(key)
    fn = lambda p, x: x @ p["kernel"]
    return quantize(fn, params, jnp.ones((2, 6)), formats={"kernel": int8})[1]


def test_the_arrays_of_a_compressed_weight_are_never_pruned(getkey):
    params, sparse = quantized_example(getkey()), one_shot(0.5)
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    none = optax.sgd(0.1)
    ways = [
        prune_by_magnitude(sparse),
        prune_by_magnitude(sparse, only="**"),
        prune_by_magnitude({"**": sparse}),
        prune(none, sparse, by_saliency()),
        straight_through(none, sparse),
        rigl(none, 0.5, every=1, until=9, distribution=uniform),
    ]
    for tx in ways:
        state = tx.init(params)
        kernel = state.mask["kernel"]
        assert kernel.values is None and kernel.scale is None
        new, state = step(tx, params, state, grads)
        assert jnp.array_equal(new["kernel"].scale, params["kernel"].scale)
        assert jnp.mean(masked(new, state)["deep"]["kernel"] == 0) == 0.5


def test_asking_for_the_arrays_of_a_compressed_weight_is_an_error(getkey):
    params = quantized_example(getkey())
    for only in ("kernel/scale", "kernel/*"):
        tx = prune_by_magnitude(one_shot(0.5), only=only)
        with pytest.raises(ValueError, match="kernel/scale.*Prune before compressing"):
            tx.init(params)
    with pytest.raises(ValueError, match="Prune before compressing"):
        make_masks({"kernel": params["kernel"]}, 0.5)
    scale = {"kernel": {"scale": jnp.zeros((1, 5), bool)}}
    with pytest.raises(ValueError, match="kernel/scale are parts of"):
        fix_masks(scale).init(params)


@pytest.mark.parametrize("given", [0.5, {"**": 0.5}])
def test_a_number_in_place_of_a_schedule_says_how_to_make_one(given):
    with pytest.raises(ValueError, match=r"got 0.5. `one_shot\(0.5\)` is that"):
        inspect.unwrap(prune)(optax.sgd(0.1), given)
