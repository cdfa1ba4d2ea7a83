import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff.data import Batch
from jaxeff.parallelism import (
    apart,
    audit,
    average,
    batch_sharding,
    diloco,
    float8,
    local_weights,
    make_mesh,
    place_state,
    powersgd,
    random_k,
    rounded,
    state_specs,
    top_k,
)
from jaxeff.precision import DynamicLossScale
from jaxeff.training import Aux, Checkpoints, init_state, make_train_step

N = 8
PARAMS = {"w": jnp.zeros((48, 40)), "b": jnp.zeros(40)}
ALL = {
    "average": average(devices=N),
    "8 bits": rounded(8, devices=N, block=64),
    "4 bits": rounded(4, devices=N, block=64),
    "1 bit": rounded(1, devices=N, block=64),
    "float8": float8(devices=N, block=64),
    "top-k": top_k(0.05, devices=N),
    "random-k": random_k(0.05, devices=N),
    "powersgd": powersgd(2, devices=N),
    "powersgd, 8 bits": powersgd(4, devices=N, bits=8, block=8),
}
each = pytest.mark.parametrize("tx", ALL.values(), ids=ALL)


def compiled(tx, mesh):
    """(gradients of all devices, state) -> (what each device gets, state)."""

    def local(grads, state):
        mean, state = tx.update(jax.tree.map(lambda g: g[0], grads), state)
        return jax.tree.map(lambda g: g[None], mean), state

    specs = state_specs(jax.eval_shape(tx.init, PARAMS))
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("data"), specs),
            out_specs=(P("data"), specs),
            check_vma=False,
        )
    )


def gradients(seed=0):
    keys = jr.split(jr.key(seed), 2)
    return {
        "w": jr.normal(keys[0], (N, 48, 40)),
        "b": jr.normal(keys[1], (N, 40)),
    }


@each
def test_all_devices_get_the_same(tx):
    got, _ = compiled(tx, make_mesh())(gradients(), tx.init(PARAMS))
    for array in jax.tree.leaves(got):
        assert (np.asarray(array) == np.asarray(array)[:1]).all()


def test_what_is_apart_is_each_devices_own():
    divided = optax.scale_by_rms(0.9, bias_correction=True)
    run = compiled(
        tx := optax.chain(apart(divided, devices=N), average(devices=N)), make_mesh()
    )
    state, own = tx.init(PARAMS), [divided.init(PARAMS)] * N
    for seed in range(3):
        grads = gradients(seed)
        got, state = run(grads, state)
        of = [jax.tree.map(lambda g, i=i: g[i], grads) for i in range(N)]
        each_one = [divided.update(g, s) for g, s in zip(of, own, strict=True)]
        own = [s for _, s in each_one]
        mean = jax.tree.map(lambda *a: sum(a) / N, *(g for g, _ in each_one))
        for a, b in zip(*map(jax.tree.leaves, (got, mean)), strict=True):
            np.testing.assert_allclose(a[3], b, rtol=1e-5, atol=1e-6)


@each
def test_what_is_sent_is_what_it_says(tx):
    mesh = make_mesh()
    program = compiled(tx, mesh).lower(gradients(), tx.init(PARAMS)).compile()
    assert audit(program, mesh).sent == pytest.approx(tx.sent(PARAMS), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "fewer"),
    [("8 bits", 3.7), ("4 bits", 7), ("1 bit", 20), ("random-k", 19), ("powersgd", 25)],
)
def test_how_much_less_is_sent(name, fewer):
    params = {"w": jnp.zeros((512, 64))}
    assert ALL["average"].sent(params) / ALL[name].sent(params) > fewer


@each
def test_nothing_is_lost_only_late(tx):
    """What was handed out and what is still kept back make up all there was."""
    run, state = compiled(tx, make_mesh()), tx.init(PARAMS)
    handed_out = jax.tree.map(jnp.zeros_like, PARAMS)
    steps = 4
    for seed in range(steps):
        got, state = run(gradients(seed), state)
        handed_out = jax.tree.map(lambda a, g: a + g[0], handed_out, got)
    total = jax.tree.map(
        lambda *g: sum(g).mean(0), *(gradients(seed) for seed in range(steps))
    )
    missing = jax.flatten_util.ravel_pytree(
        jax.tree.map(lambda a, b: a - b, total, handed_out)
    )[0]
    kept = kept_back(state, missing.size)
    np.testing.assert_allclose(missing, kept, atol=1e-5)


@each
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_on_one_device_arrives_so_on_all(tx, bad):
    grads = gradients()
    grads["w"] = grads["w"].at[3, 5, 7].set(bad)
    got, _ = compiled(tx, make_mesh())(grads, tx.init(PARAMS))
    assert not np.isfinite(got["w"]).all((1, 2)).any()


def kept_back(state, size):
    """The mean over the devices of what the state says was not handed out yet."""
    if not hasattr(state, "own"):
        return np.zeros(size)
    values = state.own.values
    if isinstance(values, dict) and "there" in values:
        there = values["there"].mean(0) + values["back"].reshape(-1)
        return there[:size]
    if isinstance(values, dict):  # a matrix's remainder, and none of the bias
        means = {"b": jnp.zeros(40), "w": values["w"].mean(0)}
        return jax.flatten_util.ravel_pytree(means)[0]
    return values.mean(0)


@pytest.mark.parametrize("name", ["average", "8 bits", "float8", "4 bits"])
def test_one_message_is_near_the_mean(name):
    tx, grads = ALL[name], gradients()
    got, _ = compiled(tx, make_mesh())(grads, tx.init(PARAMS))
    off = np.abs(got["w"][0] - grads["w"].mean(0)).max()
    # Half a step of the largest number of a block, there and back.
    steps = {"average": 1e-7, "8 bits": 1 / 127, "float8": 1 / 16, "4 bits": 1 / 7}
    assert off <= steps[name] * np.abs(grads["w"]).max()


def test_a_matrix_of_low_rank_arrives_as_it_is_after_two_steps():
    tx = powersgd(2, devices=N)
    low = jr.normal(jr.key(0), (48, 2)) @ jr.normal(jr.key(1), (2, 40))
    grads = {"w": jnp.stack([low] * N), "b": jnp.zeros((N, 40))}
    run, state = compiled(tx, make_mesh()), tx.init(PARAMS)
    for _ in range(2):
        got, state = run(grads, state)
    np.testing.assert_allclose(got["w"][0], low, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_matrix_that_begins_with_no_gradient_is_sent_once_it_has_one(bits):
    """As below a last layer of zeros, from inputs whose first are always dark."""
    tx = powersgd(4, devices=N, bits=bits, block=8)
    lit = (jnp.arange(48) >= 8)[:, None]
    low = jnp.where(lit, jr.normal(jr.key(0), (48, 2)), 0)
    low = low @ jr.normal(jr.key(1), (2, 40))
    run, state = compiled(tx, make_mesh()), tx.init(PARAMS)
    for matrix in (jnp.zeros((48, 40)), low, low):
        grads = {"w": jnp.stack([matrix] * N), "b": jnp.zeros((N, 40))}
        got, state = run(grads, state)
    off = jnp.linalg.norm(got["w"][0] - low) / jnp.linalg.norm(low)
    assert off < (1e-5 if bits is None else 0.02)


@pytest.mark.parametrize(("bits", "larger"), [(4, 10.0), (8, 100.0)])
def test_rounding_leaves_small_directions_beside_large_ones(bits, larger):
    tx = powersgd(2, devices=N, bits=bits, block=8)
    left = jnp.linalg.qr(jr.normal(jr.key(0), (48, 2)))[0]
    right = jnp.linalg.qr(jr.normal(jr.key(1), (40, 2)))[0]
    matrix = (left * jnp.array([[larger, 1.0]])) @ right.T
    grads = {"w": jnp.stack([matrix] * N), "b": jnp.zeros((N, 40))}
    run, state = compiled(tx, make_mesh()), tx.init(PARAMS)
    steps, handed_out = 8, 0
    for _ in range(steps):
        got, state = run(grads, state)
        handed_out += got["w"][0]
    small = left[:, 1] @ (handed_out / steps) @ right[:, 1]
    np.testing.assert_allclose(small, 1.0, rtol=0.05)


def loss(params, batch, key):
    logits = jnp.tanh(batch.images @ params["w"]) @ params["v"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean(), Aux({"accuracy": (logits.argmax(-1) == batch.labels).mean()})


def problem():
    keys = jr.split(jr.key(0), 3)
    params = {
        "w": jr.normal(keys[0], (32, 64)) / 6,
        "v": jr.normal(keys[1], (64, 10)) / 8,
    }
    images = jr.normal(keys[2], (64, 32))
    return params, Batch(images, (images[:, :10]).argmax(-1))


def trained(tx, steps, per_device=None, mesh=None):
    mesh = make_mesh() if mesh is None else mesh
    params, batch = problem()
    tx = optax.chain(tx, optax.sgd(0.5, momentum=0.9))
    step = make_train_step(loss, tx, per_device=per_device)
    state = init_state(params, tx, jr.key(0))
    batch = jax.device_put(batch, batch_sharding(mesh))
    for _ in range(steps):
        state, metrics = step(state, batch)
        # Devices that are threads of few cores can't run many steps at a time.
        jax.block_until_ready(metrics)
    return state, metrics


def test_the_step_on_each_device_is_the_step_on_all():
    mesh = make_mesh()
    one, of_one = trained(optax.identity(), 5)
    many, of_many = trained(average(devices=N), 5, per_device=mesh)
    for a, b in zip(*map(jax.tree.leaves, (one.params, many.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_one["loss"], of_many["loss"], rtol=1e-5)
    np.testing.assert_allclose(of_one["accuracy"], of_many["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALL if n != "average"])
def test_it_trains_nearly_as_with_the_whole_gradient(name):
    mesh = make_mesh()
    whole = trained(average(devices=N), 60, per_device=mesh)[1]["loss"]
    params, batch = problem()
    start = loss(params, batch, None)[0]
    got = trained(ALL[name], 60, per_device=mesh)[1]["loss"]
    assert whole < 0.2 * start and got < 0.35 * start


@pytest.mark.slow
def test_with_another_axis_it_is_the_same():
    mesh = make_mesh(tensor=2)
    tx = rounded(8, devices=4, block=64)
    got = trained(tx, 3, per_device=mesh, mesh=mesh)[0]
    small = make_mesh(devices=jax.devices()[:4])
    want = trained(tx, 3, per_device=small, mesh=small)[0]
    for a, b in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["8 bits", "powersgd"])
def test_what_does_not_train_is_left_alone(name):
    mesh = make_mesh()
    params, batch = problem()
    tx = optax.chain(ALL[name], optax.sgd(0.1))
    step = make_train_step(loss, tx, trainable="w", per_device=mesh)
    state, _ = step(init_state(params, tx, jr.key(0), trainable="w"), batch)
    assert (state.params["v"] == params["v"]).all()
    assert (state.params["w"] != params["w"]).any()


def test_what_gathers_before_gradients_are_averaged_is_refused():
    mesh = make_mesh()
    params, batch = problem()
    means = average(devices=N)
    run = lambda tx: make_train_step(loss, tx, per_device=mesh)(
        init_state(params, tx, jr.key(0)), batch
    )
    for early in (optax.chain(optax.clip(1.0), optax.scale_by_adam()), optax.ema(0.9)):
        with pytest.raises(ValueError, match="stands before what averages these"):
            run(optax.chain(early, means, optax.sgd(0.1)))
        run(optax.chain(means, early, optax.sgd(0.1)))
        run(optax.chain(apart(early, devices=N), means, optax.sgd(0.1)))


def test_a_state_of_other_devices_is_refused():
    mesh = make_mesh()
    params, batch = problem()
    tx = optax.chain(rounded(8, devices=N // 2), optax.sgd(0.1))
    state = init_state(params, tx, jr.key(0))
    with pytest.raises(ValueError, match="made for 4 devices, but the axis data has 8"):
        place_state(state, mesh)
    with pytest.raises(ValueError, match="made for 4 devices, but the axis data has 8"):
        make_train_step(loss, tx, per_device=mesh)(state, batch)


def test_a_number_in_a_batch_is_refused():
    params, batch = problem()
    tx = optax.chain(average(devices=N), optax.sgd(0.1))
    step = make_train_step(loss, tx, per_device=make_mesh())
    with pytest.raises(ValueError, match="along its first dim, and a number in it has"):
        step(init_state(params, tx, jr.key(0)), (batch, jnp.float32(2)))


def test_all_devices_skip_a_step_that_overflowed_on_one():
    mesh, tx = make_mesh(), optax.chain(average(devices=N), optax.sgd(1.0))

    def bad(params, batch, key):
        return (params["w"] * batch["x"]).sum(), Aux()

    step = make_train_step(bad, tx, per_device=mesh)
    x = jnp.ones(8).at[3].set(jnp.inf)
    scaler = DynamicLossScale(1024.0)
    state = init_state({"w": jnp.ones(1)}, tx, jr.key(0), scaler=scaler)
    state, metrics = step(state, {"x": x})
    assert metrics["skipped"]
    for array in (state.params["w"], state.scaler.value):
        shards = [np.asarray(s.data) for s in array.addressable_shards]
        assert all((s == shards[0]).all() for s in shards)
    assert state.params["w"] == 1


@pytest.mark.parametrize(
    "tx", [optax.identity(), apart(optax.scale_by_rms(), devices=N)]
)
def test_a_step_on_each_device_that_averages_nothing_is_an_error(tx):
    with pytest.raises(ValueError, match="nothing in tx averages them"):
        trained(tx, 1, per_device=make_mesh())


def test_integers_of_a_loss_stay_integers():
    def counted(params, batch, key):
        count = {"seen": params["seen"] + 1}
        return (params["w"] * batch["x"]).sum(), Aux({"big": jnp.int32(3)}, count)

    mesh, tx = make_mesh(), optax.chain(average(devices=N), optax.sgd(1.0))
    params = {"w": jnp.ones(1), "seen": jnp.int32(0)}
    step = make_train_step(counted, tx, trainable="w", per_device=mesh)
    state = init_state(params, tx, jr.key(0), trainable="w")
    state, metrics = step(state, {"x": jnp.ones(8)})
    assert state.params["seen"] == 1 and metrics["big"].dtype == jnp.int32


def test_each_device_draws_its_own_numbers():
    mesh, tx = make_mesh(), average(devices=N)

    def noisy(params, batch, key):
        return (params["w"] * jr.normal(key, params["w"].shape)).sum(), Aux()

    params = {"w": jnp.zeros(16)}
    tx = optax.chain(tx, optax.sgd(1.0))
    step = make_train_step(noisy, tx, per_device=mesh)
    state, _ = step(init_state(params, tx, jr.key(0)), {"x": jnp.zeros(8)})
    draws = [
        jr.normal(jr.fold_in(jr.fold_in(jr.key(0), 0), i), (16,)) for i in range(8)
    ]
    np.testing.assert_allclose(state.params["w"], -sum(draws) / 8, atol=1e-6)


def test_a_state_is_placed_as_a_step_leaves_it():
    mesh, tx = make_mesh(), rounded(8, devices=N, block=64)
    params, batch = problem()
    step = make_train_step(loss, tx, per_device=mesh)
    first = lambda: place_state(init_state(params, tx, jr.key(0)), mesh)
    state = first()
    own = state.opt_state.own.values["there"]
    assert own.addressable_shards[0].data.shape[0] == 1
    after, _ = step(state, batch)
    placed = zip(*map(jax.tree.leaves, (after, first())), strict=True)
    assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in placed)
    specs = state_specs(after.opt_state)
    assert specs.own == P("data") and specs.step == P()


RESUMED = {
    "4 bits": optax.chain(rounded(4, devices=N, block=64), optax.adam(1e-2)),
    "apart": optax.chain(
        apart(optax.scale_by_rms(), devices=N), powersgd(2, devices=N), optax.sgd(0.1)
    ),
    "diloco": diloco(
        optax.adamw(1e-2), optax.sgd(0.7, momentum=0.9), every=3, devices=N
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name, tmp_path):
    mesh, tx = make_mesh(), RESUMED[name]
    view = local_weights if name == "diloco" else None
    params, batch = problem()
    step = make_train_step(loss, tx, per_device=mesh, view=view)
    first = lambda: place_state(init_state(params, tx, jr.key(0)), mesh)

    def after(state, steps):
        for _ in range(steps):
            state, _ = jax.block_until_ready(step(state, batch))
        return state

    # In between of two meetings: devices have drifted apart.
    state = after(first(), 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        back = checkpoints.restore(first())
    leaves = lambda s: jax.tree.leaves((s.params, s.opt_state))
    for a, b in zip(leaves(after(state, 3)), leaves(after(back, 3)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rounded(3, devices=8), "8, 4 or 1 bits .* got 3 bits"),
        (
            lambda: rounded(8, devices=8, block=12),
            "multiple of 8, got 8 bits in blocks of 12",
        ),
        (lambda: rounded(8, devices=0), "got devices=0"),
        (lambda: average(devices=0), "got devices=0"),
        (lambda: powersgd(devices=0), "got devices=0"),
        (lambda: float8(devices=8, block=0), "got 0"),
        (lambda: top_k(0.0, devices=8), r"in \(0, 1\], got 0.0"),
        (lambda: random_k(1.5, devices=8), r"in \(0, 1\], got 1.5"),
        (lambda: powersgd(0, devices=8), "got rank=0"),
    ],
)
def test_what_makes_no_message_is_an_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_axis_of_another_size_is_an_error():
    mesh = make_mesh(devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="made for 8 devices, but the axis data has 4"):
        trained(rounded(8, devices=8), 1, per_device=mesh, mesh=mesh)
