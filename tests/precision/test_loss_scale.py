import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from hypothesis import given, strategies as st

from jaxeff.precision import all_finite, autocast, DynamicLossScale
from jaxeff.training import Aux, init_state, make_train_step

# Every field off its default.
ODD = DynamicLossScale(
    value=6.0, good_steps=3, period=5, factor=3.0, minimum=2.0, maximum=54.0
)


def test_flatten_then_unflatten_changes_no_field():
    again = jax.tree.map(lambda x: x, ODD)
    assert again == ODD
    arrays, treedef = jax.tree.flatten(ODD)
    assert len(arrays) == 2
    assert jax.tree.unflatten(treedef, arrays) == ODD
    for field in dataclasses.fields(ODD):
        assert getattr(ODD, field.name) != getattr(DynamicLossScale(), field.name)


@given(good=st.lists(st.booleans(), max_size=40))
def test_it_halves_on_overflow_doubles_after_a_period_and_stays_in_bounds(good):
    scaler, value, run = ODD, 6.0, 3
    for finite in good:
        scaler = scaler.adjust(jnp.array(finite))
        run = run + 1 if finite else 0
        if not finite:
            value = max(value / 3, 2.0)
        elif run == 5:
            value, run = min(value * 3, 54.0), 0
        assert float(scaler.value) == pytest.approx(value, rel=1e-6)
        assert int(scaler.good_steps) == run
    assert jax.tree.structure(scaler) == jax.tree.structure(ODD)


def test_adjusting_keeps_the_types_so_a_scan_can_carry_it():
    scaler, _ = jax.lax.scan(
        lambda s, finite: (s.adjust(finite), None),
        DynamicLossScale(period=2),
        jnp.array([True, True, False, True, True]),
    )
    assert float(scaler.value) == 2.0**16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaling_and_unscaling_a_gradient_changes_no_bit(dtype, getkey):
    w, x = jr.normal(getkey(), (5, 4), dtype), jr.normal(getkey(), (3, 5), dtype)
    loss = lambda w: jnp.mean(jnp.square(jnp.tanh(x @ w)))
    scaler = DynamicLossScale()
    scaled = scaler.unscale(jax.grad(lambda w: scaler.scale(loss(w)))(w))
    plain = jax.grad(lambda w: loss(w).astype(jnp.float32))(w)
    assert scaled.dtype == w.dtype
    assert jnp.array_equal(scaled, plain)


def test_what_float16_would_round_to_zero_arrives(getkey):
    x = jr.uniform(getkey(), (4, 8), minval=0.5)
    loss = autocast(lambda w, x: 1e-7 * jnp.mean(x @ w), jnp.float16)
    w = jnp.ones((8, 2))
    scaler = DynamicLossScale()
    lost = jax.grad(loss)(w, x)
    kept = scaler.unscale(jax.grad(lambda w: scaler.scale(loss(w, x)))(w))
    true = jax.grad(lambda w: 1e-7 * jnp.mean(x @ w))(w)
    assert jnp.allclose(kept, true, rtol=2e-3, atol=0)
    assert not jnp.allclose(lost, true, rtol=0.1, atol=0)


def test_integers_and_absent_leaves_pass_through():
    grads = {"w": jnp.ones(3), "step": jnp.arange(2), "frozen": None}
    out = DynamicLossScale(value=4.0).unscale(grads)
    assert jnp.array_equal(out["w"], jnp.full(3, 0.25))
    assert jnp.array_equal(out["step"], grads["step"])
    assert out["frozen"] is None
    assert all_finite(grads) and all_finite({})


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_one_bad_number_anywhere_is_found(bad, dtype):
    tree = {"a": jnp.zeros((2, 3), dtype), "b": [jnp.zeros(4, dtype), None]}
    assert all_finite(tree)
    tree["b"][0] = tree["b"][0].at[3].set(bad)
    assert not all_finite(tree)


@pytest.mark.parametrize(
    "options",
    [
        {"minimum": 0.0},
        {"value": 0.5},
        {"value": 2.0**25},
        {"maximum": float("inf")},
        {"factor": 1.0},
        {"period": 0},
    ],
)
def test_a_scale_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match="a loss scale"):
        DynamicLossScale(**options)


def test_a_float16_run_that_overflows_recovers_and_skips_only_the_bad_steps(getkey):
    x = jr.normal(getkey(), (64, 6))
    y = x @ jr.normal(getkey(), (6, 3))

    def plain(params, batch, key):
        x, y = batch
        h = jnp.tanh(x @ params["inner"])
        return jnp.mean(jnp.square(h @ params["outer"] - y)), Aux()

    params = {"inner": jr.normal(getkey(), (6, 16)), "outer": jnp.zeros((16, 3))}
    tx = optax.adam(1e-2)
    step = make_train_step(autocast(plain, jnp.float16), tx)
    # A start far too high; and, at step 60, a batch that overflows at any scale.
    scaler = DynamicLossScale(value=2.0**24, period=25)
    state = init_state(params, tx, jr.key(0), scaler=scaler)
    first, skipped = float(plain(params, (x, y), None)[0]), []
    for i in range(150):
        before = jax.tree.map(jnp.copy, (state.params, state.opt_state))
        scale = float(state.scaler.value)
        state, metrics = step(state, (x * 1e30, y) if i == 60 else (x, y))
        after = (state.params, state.opt_state)
        same = jax.tree.map(jnp.array_equal, before, after)
        assert all(jax.tree.leaves(same)) == bool(metrics["skipped"])
        assert all_finite(after)
        if metrics["skipped"]:
            assert float(state.scaler.value) == scale / 2
        skipped.append(bool(metrics["skipped"]))
    assert skipped[0] and skipped[60]
    assert sum(skipped) < 30
    assert float(plain(state.params, (x, y), None)[0]) < 0.3 * first
