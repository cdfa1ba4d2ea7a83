import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax.core import freeze

from jaxeff.parallelism import average, make_mesh
from jaxeff.precision import all_finite
from jaxeff.training import Aux, init_state, make_train_step
from jaxeff.tree import pytree
from tests.training.small import make_loss, Net, small_run, TRAINABLE, TX, variables

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_steps_are_those_of_a_hand_written_loop_bit_for_bit",
}


def same(a, b):
    same_leaf = lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(same_leaf, a, b))
    )


def test_steps_are_those_of_a_hand_written_loop_bit_for_bit():
    step, state, data = small_run()
    loss = make_loss(Net())
    params, stats = variables()["params"], variables()["batch_stats"]
    opt_state, key = TX.init(params), jr.key(1)

    @jax.jit
    def by_hand(params, stats, opt_state, n, batch):
        def objective(params):
            both = {"params": params, "batch_stats": stats}
            value, aux = loss(both, batch, jr.fold_in(key, n))
            return value, aux.updates["batch_stats"]

        (value, new), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state, value

    for n, batch in zip(range(5), data(0), strict=False):
        state, metrics = step(state, batch)
        params, stats, opt_state, value = by_hand(params, stats, opt_state, n, batch)
        assert jnp.array_equal(metrics["loss"], value)
    assert same(state.params, {"batch_stats": stats, "params": params})
    assert int(state.step) == 5

    # And no work beside theirs, but counting the step.
    hand = by_hand.lower(params, stats, opt_state, 0, batch).compile().cost_analysis()
    ours = step.lower(state, batch).compile().cost_analysis()
    assert abs(ours["flops"] - hand["flops"]) <= 1


def test_a_run_traces_its_loss_once():
    _, state, data = small_run()
    traces = []

    def loss(*args):
        traces.append(1)
        return make_loss(Net())(*args)

    step = make_train_step(loss, TX, trainable=TRAINABLE)
    for _, batch in zip(range(3), data(0), strict=False):
        state, _ = step(state, batch)
    assert len(traces) == 1


def quadratic(params, batch, key):
    del batch, key
    floats = [
        x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return sum(jnp.sum(x**2) for x in floats), Aux()


def test_what_is_frozen_or_integer_stays_and_costs_no_optimizer_state():
    params = {
        "base": {"kernel": jnp.ones(3)},
        "head": {"kernel": jnp.ones(3), "count": jnp.arange(4)},
    }
    tx = optax.adam(0.1)
    state = init_state(params, tx, jr.key(0), trainable="head/**")
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 1 + 3 + 3
    state, _ = make_train_step(quadratic, tx, trainable="head/**")(state, None)
    assert same(state.params["base"], params["base"])
    assert same(state.params["head"]["count"], params["head"]["count"])
    assert jnp.all(state.params["head"]["kernel"] < 1)


def test_donation_never_takes_the_callers_arrays():
    w, key = jnp.ones(3), jr.key(0)
    params = {"a": w, "tied": w}
    state = init_state(params, optax.sgd(0.1), key)
    new, _ = make_train_step(quadratic, optax.sgd(0.1))(state, None)
    assert jnp.array_equal(w, jnp.ones(3))
    assert not key.is_deleted()
    assert state.params["a"].is_deleted() and not new.params["a"].is_deleted()


def test_each_step_draws_from_a_key_of_its_own_and_the_state_decides_it():
    def noise(params, batch, key):
        return jnp.sum(params["w"]), Aux({"noise": jr.normal(key)})

    params, tx = {"w": jnp.ones(2)}, optax.sgd(0.1)
    step = make_train_step(noise, tx)
    runs = []
    for _ in range(2):
        state, seen = init_state(params, tx, jr.key(3)), []
        for _ in range(3):
            state, metrics = step(state, None)
            seen.append(float(metrics["noise"]))
        runs.append(seen)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def returning(updates):
    return lambda params, batch, key: (jnp.sum(params["w"] ** 2), Aux(updates=updates))


def step_with(loss, trainable="**", accumulate=1):
    params = {"w": jnp.ones(2), "stats": jnp.zeros(2)}
    tx = optax.sgd(0.1)
    step = make_train_step(loss, tx, trainable=trainable, accumulate=accumulate)
    state = init_state(params, tx, jr.key(0), trainable=trainable)
    return step(state, jnp.zeros(2))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("trainable", ["**", "w"])
def test_updates_replace_entries_of_params(trainable, parts):
    loss = returning({"stats": jnp.full(2, 7.0)})
    state, _ = step_with(loss, trainable=trainable, accumulate=parts)
    assert jnp.array_equal(state.params["stats"], jnp.full(2, 7.0))


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        ({"state": jnp.zeros(2)}, r"has \['stats', 'w'\], but the loss updates"),
        ({"stats": jnp.zeros(3)}, r"turns stats from float32\[2\] into float32\[3\]"),
        ({"stats": jnp.zeros(2, int)}, r"into int32\[2\]"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_that_fits_no_entry_is_an_error(updates, said, parts):
    with pytest.raises(ValueError, match=said):
        step_with(returning(updates), accumulate=parts)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", [dict, freeze])
@pytest.mark.parametrize("new_kind", [dict, freeze])
def test_a_step_keeps_the_types_of_its_params(kind, new_kind, parts):
    def loss(params, batch, key):
        updates = {"stats": new_kind({"n": params["stats"]["n"] + 1})}
        return params["params"]["w"].sum(), Aux(updates=updates)

    params = kind({"params": {"w": jnp.ones(2)}, "stats": {"n": jnp.zeros(2)}})
    state = init_state(params, TX, jr.key(0), trainable=TRAINABLE)
    step = make_train_step(loss, TX, trainable=TRAINABLE, accumulate=parts)
    state, _ = step(state, jnp.zeros(2))
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert (state.params["stats"]["n"] == parts).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, batch, key: jnp.sum(params["w"]),
        lambda params, batch, key: (params["w"], Aux()),
        lambda params, batch, key: (jnp.sum(params["w"]), {}),
    ],
)
def test_a_loss_of_another_form_is_an_error(loss):
    with pytest.raises(ValueError, match=r"a loss returns \(scalar, Aux"):
        step_with(loss)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'weights/\*\*' matches none"):
        init_state(variables(), TX, jr.key(0), trainable="weights/**")


@pytree
class PowerOfTwo:
    """A scaler that halves its scale at each overflow."""

    factor: jax.Array

    def scale(self, loss):
        return loss * self.factor

    def unscale(self, grads):
        return jax.tree.map(lambda g: g / self.factor, grads)

    def adjust(self, finite):
        return PowerOfTwo(jnp.where(finite, self.factor, self.factor / 2))


def test_scaling_the_loss_changes_only_the_rounding(getkey):
    def loss(params, batch, key):
        return jnp.mean((batch @ params["w"] - 1) ** 2), Aux()

    tx = optax.sgd(0.1)
    step, x = make_train_step(loss, tx), jr.normal(getkey(), (16, 4))
    ends = []
    for scaler in (None, PowerOfTwo(jnp.float32(2.0**10))):
        state = init_state({"w": jnp.ones(4)}, tx, getkey(), scaler=scaler)
        for _ in range(5):
            state, metrics = step(state, x)
        ends.append((state.params["w"], metrics["loss"]))
    (w, value), (scaled_w, scaled_value) = ends
    assert jnp.allclose(w, scaled_w, rtol=1e-6)
    assert jnp.allclose(value, scaled_value, rtol=1e-6)


def test_a_step_with_an_infinite_gradient_changes_only_scale_and_count():
    def loss(params, batch, key):
        # The gradient of sqrt is infinite at 0, though the loss is finite.
        return jnp.sum(jnp.sqrt(params["w"] * batch)), Aux(updates={"n": jnp.ones(1)})

    params, tx = {"w": jnp.ones(2), "n": jnp.zeros(1)}, optax.adam(0.1)
    step = make_train_step(loss, tx)
    scaler = PowerOfTwo(jnp.float32(8))
    first = init_state(params, tx, jr.key(0), scaler=scaler)
    before = jax.tree.map(jnp.copy, first)
    after, metrics = step(first, jnp.zeros(2))
    assert bool(metrics["skipped"]) and jnp.isfinite(metrics["loss"])
    assert same(after.params, before.params)
    assert same(after.opt_state, before.opt_state)
    assert int(after.step) == 1 and float(after.scaler.factor) == 4
    moved, metrics = step(after, jnp.ones(2))
    assert not metrics["skipped"] and not same(moved.params, before.params)
    assert float(moved.scaler.factor) == 4


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_all_finite_sees_one_bad_entry_in_any_float_array(bad):
    good = {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16), "i": jnp.arange(3)}
    assert all_finite(good)
    assert not all_finite(good | {"b": good["b"].at[1, 0].set(bad)})


# Parts of a batch.


def plain_problem(getkey):
    """A loss that is a mean over examples, with nothing else in it."""
    params = {"w": jr.normal(getkey(), (5, 3)), "n": jnp.arange(3)}
    batch = jr.normal(getkey(), (12, 5)), jr.normal(getkey(), (12, 3))

    def loss(params, batch, key):
        x, y = batch
        off = ((jnp.tanh(x @ params["w"]) - y) ** 2).mean(-1)
        return off.mean(), Aux({"off": off.mean(), "most": jnp.array(len(off))})

    return loss, params, batch


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_the_parts_of_a_batch_add_up_to_it(parts, getkey):
    loss, params, batch = plain_problem(getkey)
    tx = optax.sgd(0.1, momentum=0.9)
    states = []
    for accumulate in (1, parts):
        step = make_train_step(loss, tx, accumulate=accumulate)
        state = init_state(params, tx, jr.key(0))
        for _ in range(3):
            state, metrics = step(state, batch)
        states.append((state.params, state.opt_state, metrics["loss"], metrics["off"]))
        assert metrics["most"] == 12 // accumulate
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, *states)


def test_each_part_goes_on_from_the_running_averages_and_draws_its_own():
    _, state, data = small_run()
    loss, batch = make_loss(Net()), next(data(0))
    start = jax.tree.map(jnp.copy, state.params)
    step = make_train_step(loss, optax.sgd(0.0), accumulate=2, trainable=TRAINABLE)
    state = init_state(start, optax.sgd(0.0), jr.key(1), trainable=TRAINABLE)
    state, metrics = step(state, batch)
    key, now, values = jr.fold_in(jr.key(1), 0), start, []
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i::2], batch)
        value, aux = loss(now, part, jr.fold_in(key, i))
        now, values = {**now, **aux.updates}, [*values, value]
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, dict(state.params), now)
    near(metrics["loss"], sum(values) / 2)


def test_a_batch_that_has_no_such_parts_is_an_error(getkey):
    loss, params, batch = plain_problem(getkey)
    with pytest.raises(ValueError, match="1 part or more, got accumulate=0"):
        make_train_step(loss, TX, accumulate=0)
    step = make_train_step(loss, TX, accumulate=5)
    with pytest.raises(ValueError, match="12 examples .* do not into accumulate=5"):
        step(init_state(params, TX, jr.key(0)), batch)


def test_the_sum_of_many_parts_is_as_exact_as_that_of_one(getkey):
    """In bfloat16 a sum of 256 numbers would lose all that is below 1/256 of it."""
    params = {"w": jr.normal(getkey(), (64,)).astype(jnp.bfloat16)}
    batch = jr.normal(getkey(), (256, 64))
    # What the optimizer is given becomes its state.
    seen = lambda g, _, params: (jax.tree.map(jnp.zeros_like, g), g)
    keep = optax.GradientTransformation(lambda p: p, seen)

    def loss(params, batch, key):
        return ((batch @ params["w"].astype(jnp.float32) - 1) ** 2).mean(), Aux()

    def gradient(parts):
        step = make_train_step(loss, keep, accumulate=parts)
        state, _ = step(init_state(params, keep, jr.key(0)), batch)
        assert state.opt_state["w"].dtype == jnp.bfloat16
        return state.opt_state["w"].astype(jnp.float32)

    whole = gradient(1)
    assert jnp.linalg.norm(gradient(256) - whole) < 0.005 * jnp.linalg.norm(whole)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "bool"])
def test_of_integers_on_devices_the_largest_is_taken(dtype):
    mesh, most = make_mesh(), 1 if dtype == "bool" else np.iinfo(dtype).max
    tx = optax.chain(average(devices=8), optax.sgd(0.1))

    def loss(params, batch, key):
        return params["w"].sum(), Aux({"most": batch["n"][0]})

    step = make_train_step(loss, tx, per_device=mesh)
    numbers = np.zeros(8, dtype)
    numbers[3] = most
    _, metrics = step(init_state({"w": jnp.ones(2)}, tx, jr.key(0)), {"n": numbers})
    got = np.asarray(metrics["most"])
    assert got.dtype == dtype and got == most


@pytest.mark.parametrize("scaler", [None, PowerOfTwo(jnp.float32(8))])
@pytest.mark.parametrize("parts, spread", [(1, False), (2, False), (1, True)])
def test_a_loss_may_update_a_random_key(parts, spread, scaler):
    tx = optax.chain(average(devices=8), optax.sgd(0.1)) if spread else optax.sgd(0.1)
    options = {"per_device": make_mesh()} if spread else {"accumulate": parts}

    def loss(params, batch, key):
        updates = {"key": jr.fold_in(params["key"], 1)}
        return params["w"].sum() * batch.mean(), Aux(updates=updates)

    step = make_train_step(loss, tx, **options)
    params = {"w": jnp.ones(2), "key": jr.key(5)}
    state = init_state(params, tx, jr.key(0), scaler=scaler)
    for _ in range(2):
        state, _ = step(state, np.ones(8, np.float32))
    want = jr.key(5)
    for _ in range(2 * parts):
        want = jr.fold_in(want, 1)
    assert state.params["key"] == want
