"""Devices that train apart: what a meeting makes of them, and what is sent."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff.data import Batch
from jaxeff.parallelism import (
    audit,
    batch_sharding,
    diloco,
    local_weights,
    make_mesh,
    place_state,
)
from jaxeff.training import Aux, init_state, make_train_step

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_they_train_alone_and_then_the_mean_is_the_outer_gradient[local SGD]",
}

N, ROWS = 8, 4
PARAMS = {
    "a": {"w": 0.1 * jr.normal(jr.key(5), (6, 7)), "b": jnp.zeros(7)},
    "c": jnp.ones((7, 3)),
}


def loss(params, batch, key):
    x = jnp.tanh(batch.images @ params["a"]["w"] + params["a"]["b"][None]) @ params["c"]
    return jnp.mean((x - batch.labels) ** 2), Aux()


def batch_of(step):
    keys = jr.split(jr.fold_in(jr.key(1), step), 2)
    return Batch(jr.normal(keys[0], (N * ROWS, 6)), jr.normal(keys[1], (N * ROWS, 3)))


def together(tx, steps, mesh=None):
    """The states after each step."""
    mesh = make_mesh() if mesh is None else mesh
    step = make_train_step(loss, tx, per_device=mesh, view=local_weights)
    state = place_state(init_state(PARAMS, tx, jr.key(0)), mesh)
    states = []
    for n in range(steps):
        state, _ = step(
            state, jax.device_put(batch_of(n), batch_sharding(mesh, N * ROWS))
        )
        states.append(jax.device_get(state.params))
    return states


def gradient(params, batch):
    return jax.grad(lambda p: loss(p, batch, None)[0])(params)


def alone(tx, params, opt_state, device, steps):
    """One device by itself, from step `steps.start` on."""
    for n in steps:
        mine = jax.tree.map(
            lambda x: x[device * ROWS : (device + 1) * ROWS], batch_of(n)
        )
        grads = gradient(params, mine)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def near(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b
    )


OUTER = {
    "local SGD": optax.sgd(1.0),
    "DiLoCo": optax.sgd(0.7, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_they_train_alone_and_then_the_mean_is_the_outer_gradient(outer):
    inner, every = optax.adamw(1e-2), 3
    got = together(diloco(inner, outer, every=every, devices=N), 2 * every)
    agreed, kept = PARAMS, [inner.init(PARAMS)] * N
    outer_state = outer.init(PARAMS)
    for meeting in range(2):
        steps = range(meeting * every, (meeting + 1) * every)
        ends = []
        for device in range(N):
            end, kept[device] = alone(inner, agreed, kept[device], device, steps)
            ends.append(end)
        mean = jax.tree.map(lambda *x: sum(x) / N, *ends)
        outer_grad = jax.tree.map(jnp.subtract, agreed, mean)
        updates, outer_state = outer.update(outer_grad, outer_state, agreed)
        # Between two meetings the params are what they were.
        for n in steps[:-1]:
            jax.tree.map(np.testing.assert_array_equal, got[n], jax.device_get(agreed))
        agreed = optax.apply_updates(agreed, updates)
        near(got[steps[-1]], agreed)
        agreed = got[steps[-1]]


def test_meeting_at_every_step_is_data_parallelism():
    got = together(diloco(optax.sgd(0.1), optax.sgd(1.0), every=1, devices=N), 3)[-1]
    want, tx = PARAMS, optax.sgd(0.1)
    for n in range(3):
        grads = gradient(want, batch_of(n))
        want = optax.apply_updates(want, tx.update(grads, tx.init(want), want)[0])
    near(got, want)


def test_one_device_is_the_inner_optimizer():
    mesh = make_mesh(devices=jax.devices()[:1])
    inner = optax.adam(1e-2)
    tx = diloco(inner, optax.sgd(1.0), every=4, devices=1)
    step = make_train_step(loss, tx, per_device=mesh, view=local_weights)
    state = place_state(init_state(PARAMS, tx, jr.key(0)), mesh)
    want, kept = PARAMS, inner.init(PARAMS)
    for n in range(8):
        state, _ = step(state, batch_of(n))
        grads = gradient(want, batch_of(n))
        updates, kept = inner.update(grads, kept, want)
        want = optax.apply_updates(want, updates)
    near(jax.device_get(state.params), jax.device_get(want))


def test_parts_meet_in_turn():
    every = 4
    tx = diloco(optax.sgd(0.1), optax.sgd(1.0), every=every, devices=N, parts=2)
    states = [jax.device_get(PARAMS), *together(tx, 2 * every)]
    changed = lambda a, b: bool((a != b).any())
    moved = [jax.tree.map(changed, old, new) for old, new in itertools.pairwise(states)]
    part = lambda w, rest: {"a": {"w": w, "b": rest}, "c": rest}
    # 42 numbers, and 7 + 21.
    turn = [
        part(False, False),
        part(True, False),
        part(False, False),
        part(False, True),
    ]
    assert moved == turn * 2


def test_what_is_sent_between_meetings_is_the_loss_alone():
    mesh, every = make_mesh(), 10
    tx = diloco(optax.adam(1e-2), optax.sgd(1.0), every=every, devices=N)
    step = make_train_step(loss, tx, per_device=mesh, view=local_weights)
    state = place_state(init_state(PARAMS, tx, jr.key(0)), mesh)
    batch = jax.device_put(batch_of(0), batch_sharding(mesh, N * ROWS))
    found = audit(jax.jit(step).lower(state, batch).compile(), mesh).collectives
    always = sum(c.bytes for c in found if c.certain)
    at_meetings = sum(c.sent for c in found if not c.certain)
    assert always == 4
    assert at_meetings == pytest.approx(every * tx.sent(PARAMS))


def test_errors():
    tx = lambda **options: diloco(optax.sgd(1.0), optax.sgd(1.0), devices=N, **options)
    with pytest.raises(
        ValueError, match="1 <= parts <= every, got parts=5 and every=4"
    ):
        tx(every=4, parts=5)
    with pytest.raises(ValueError, match="there are 3 for parts=4"):
        tx(every=4, parts=4).init(PARAMS)
    with pytest.raises(ValueError, match="but it has 0"):
        local_weights(PARAMS, optax.sgd(1.0).init(PARAMS))
    with pytest.raises(ValueError, match="update needs them"):
        jax.shard_map(
            lambda: tx(every=2).update(PARAMS, tx(every=2).init(PARAMS))[0],
            mesh=make_mesh(),
            in_specs=(),
            out_specs=jax.sharding.PartitionSpec(),
        )()


def test_without_a_view_of_the_own_weights_it_is_refused():
    tx = diloco(optax.sgd(0.1), optax.sgd(1.0), every=2, devices=N)
    step = make_train_step(loss, tx, per_device=make_mesh())
    with pytest.raises(ValueError, match="Give view=parallelism.local_weights"):
        step(init_state(PARAMS, tx, jr.key(0)), batch_of(0))
