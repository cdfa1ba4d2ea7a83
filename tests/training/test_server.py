"""Each batch counts once, whatever the workers do; and no gradient is too old."""

import threading
from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax.core import freeze
from hypothesis import given, strategies as st

from jaxeff.training import (
    Aux,
    Checkpoints,
    init_state,
    make_train_step,
    TrainState,
)
from jaxeff.training.server import (
    Done,
    first_state,
    gradient,
    Kept,
    MOST_LATE,
    ParameterServer,
)
from tests.training.small import make_loss, Net, small_run, TRAINABLE, variables

PARAMS = {"w": jnp.zeros(3)}
SGD = optax.sgd(1.0)


def kept(steps, params=PARAMS, tx=SGD):
    return first_state(init_state(params, tx, jr.key(0)), steps)


def done(batch, size=3):
    """A gradient that tells its batch, exactly in float32."""
    return Done({"w": jnp.full(size, 2.0**batch)}, Aux(), 0.0, 1)


class Batch(NamedTuple):
    labels: np.ndarray


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@given(st.data(), st.integers(1, 12), st.integers(0, 5))
def test_each_batch_counts_once_and_none_is_too_old(data, steps, staleness):
    clock = Clock()
    server = ParameterServer(
        kept(steps), SGD, staleness=staleness, compensation=0, lease=1, clock=clock
    )
    works, gone, late = [], [], 0
    for _ in range(60):
        if server.finished:
            break
        what = data.draw(st.sampled_from(["take", "give", "again", "leave", "late"]))
        if what == "take":
            worker = f"{data.draw(st.integers(0, 3))}"
            if (work := server.take(worker)) is not None:
                works.append((worker, work))
        elif what == "give" and works:
            worker, work = works.pop(data.draw(st.integers(0, len(works) - 1)))
            assert server.give(work.ticket, done(work.batch))
            gone.append(work)
            late = 0
        elif what == "again" and gone:
            work = data.draw(st.sampled_from(gone))
            assert not server.give(work.ticket, done(work.batch))
        elif what == "leave" and works:
            worker = data.draw(st.sampled_from(works))[0]
            server.leave(worker)
            gone += [work for name, work in works if name == worker]
            works = [(name, work) for name, work in works if name != worker]
        elif what == "late" and late < MOST_LATE - 1:
            late += 1
            clock.now += 11.0  # longer than any lease
            gone += [work for _, work in works]
            works = []
    while not server.finished:  # one worker that works is enough
        for _, work in works:
            server.give(work.ticket, done(work.batch))
        works = []
        if (work := server.take("last")) is not None:
            server.give(work.ticket, done(work.batch))
    assert sorted(a.batch for a in server.log) == list(range(steps))
    assert len({a.ticket for a in server.log}) == steps
    assert all(0 <= a.staleness <= staleness for a in server.log)
    # Every gradient once: the sum of different powers of two.
    np.testing.assert_array_equal(
        server.kept().state.params["w"], -np.full(3, 2.0**steps - 1)
    )


def worked(server, batches, grad, name="a"):
    """A worker, to the end."""
    while not server.finished:
        work = server.take(name, wait=0.1)
        if work is None:
            continue
        batch = next(batches(work.batch))
        key = jr.fold_in(jr.key(1), work.batch)
        grads, (value, aux) = grad(work.params, batch, key)
        server.give(work.ticket, Done(grads, aux, float(value), len(batch.labels)))


def test_without_staleness_it_is_the_run_of_one():
    # Not Adam: it divides by the gradient's size, and makes a step out of rounding.
    tx, loss = optax.sgd(0.1, momentum=0.9), make_loss(Net())
    begin = lambda: init_state(variables(), tx, jr.key(1), trainable=TRAINABLE)
    server = ParameterServer(
        first_state(begin(), 5), tx, trainable=TRAINABLE, staleness=0
    )
    batches, grad = small_run()[2], gradient(loss, TRAINABLE)
    threads = [
        threading.Thread(target=worked, args=(server, batches, grad, str(i)))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    step, state = make_train_step(loss, tx, trainable=TRAINABLE), begin()
    stream = batches(0)
    for _ in range(5):
        state, _ = step(state, next(stream))
    got = server.kept().state
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(near, got.params, state.params)
    jax.tree.map(near, got.opt_state, state.opt_state)
    assert int(got.step) == 5


def test_the_compensation_is_what_the_curvature_does():
    """Of e^w gradient and curvature are 1 at 0, so c = 1 is exact to first order."""
    off = []
    for compensation in (0.0, 1.0):
        begin = kept(2, {"w": jnp.zeros(())})
        server = ParameterServer(begin, SGD, staleness=1, compensation=compensation)
        first, second = server.take("a"), server.take("b")
        assert first is not None and second is not None
        moved = Done({"w": jnp.asarray(0.01)}, Aux(), 0.0, 1)
        server.give(first.ticket, moved)
        server.give(
            second.ticket, Done({"w": jnp.exp(second.params["w"])}, Aux(), 0.0, 1)
        )
        want = -0.01 - np.exp(-0.01)
        off.append(abs(float(server.kept().state.params["w"]) - want))
    assert off[1] < 0.01 * off[0]


def test_running_averages_move_by_what_each_batch_moved_them_over_its_delay():
    stats = {"mean": jnp.ones(2), "seen": jnp.zeros((), jnp.int32)}
    tree = {"params": PARAMS, "batch_stats": stats}
    begin = first_state(init_state(tree, SGD, jr.key(0), trainable=TRAINABLE), 2)
    server = ParameterServer(begin, SGD, trainable=TRAINABLE, staleness=1)
    works = [server.take(name) for name in "ab"]
    for by, work in zip((0.5, 0.25), works, strict=True):
        then = work.params["batch_stats"]
        stats = {"mean": then["mean"] + by, "seen": then["seen"] + 1}
        grads = {"params": PARAMS, "batch_stats": {"mean": None, "seen": None}}
        server.give(
            work.ticket, Done(grads, Aux(updates={"batch_stats": stats}), 0.0, 1)
        )
    got = server.kept().state.params["batch_stats"]
    np.testing.assert_allclose(got["mean"], 1 + 0.5 + 0.25 / 2)
    assert got["seen"] == 2  # what counts, counts


def test_running_averages_stay_within_what_they_average_however_late():
    tree = {"params": PARAMS, "batch_stats": {"var": jnp.ones(())}}
    begin = first_state(init_state(tree, SGD, jr.key(0), trainable=TRAINABLE), 200)
    server = ParameterServer(begin, SGD, trainable=TRAINABLE, staleness=60)
    out = deque(server.take(f"{i}") for i in range(31))
    seen = []
    while out:
        work = out.popleft()
        var = 0.9 * work.params["batch_stats"]["var"] + 0.1 * 4.0
        updates = {"batch_stats": {"var": var}}
        grads = {"params": PARAMS, "batch_stats": {"var": None}}
        server.give(work.ticket, Done(grads, Aux(updates=updates), 0.0, 1))
        seen.append(float(server.kept().state.params["batch_stats"]["var"]))
        if (work := server.take("0")) is not None:
            out.append(work)
    assert max(a.staleness for a in server.log) == 30
    assert 1 <= min(seen) and max(seen) <= 4 and seen == sorted(seen)


def test_it_goes_on_from_a_checkpoint_with_the_batches_that_are_left(tmp_path):
    server = ParameterServer(kept(6), SGD, staleness=9, compensation=0)
    works = [server.take("a") for _ in range(4)]
    for i in (3, 1):
        server.give(works[i].ticket, done(i))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(server.kept())
        again = checkpoints.restore(kept(6))
    assert isinstance(again, Kept) and isinstance(again.state, TrainState)
    server = ParameterServer(again, SGD, staleness=9, compensation=0)
    assert server.version == 2
    while (work := server.take("b")) is not None:
        server.give(work.ticket, done(work.batch))
    assert [a.batch for a in server.log] == [0, 2, 4, 5]
    np.testing.assert_array_equal(server.kept().state.params["w"], -np.full(3, 63.0))


@pytest.mark.parametrize("kind", [dict, freeze])
def test_updates_at_the_server_are_those_of_a_step(kind):
    """Without staleness; also a key, a count, and an entry that trains."""
    stats = {"n": jnp.zeros((), jnp.int32), "key": jr.key(3), "on": jnp.array(False)}
    params = kind({"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}, "c": stats})

    def loss(params, batch, key):
        c = params["c"]
        c = {"n": c["n"] + 1, "key": jr.fold_in(c["key"], 1), "on": ~c["on"]}
        updates = {"b": {"w": params["b"]["w"] * 3}, "c": c}
        value = params["a"]["w"].sum() * params["b"]["w"].sum()
        return value, Aux(updates=updates)

    server = ParameterServer(kept(3, params), SGD, staleness=0)
    grad, batches = gradient(loss), lambda n: iter([Batch(np.zeros(1))])
    worked(server, batches, grad)
    step, state = make_train_step(loss, SGD), kept(3, params).state
    for _ in range(3):
        state, _ = step(state, None)
    got = server.kept().state.params
    assert jax.tree.structure(got) == jax.tree.structure(params)
    equal = jax.tree.map(lambda x, y: (x == y).all(), got, state.params)
    assert all(jax.tree.leaves(equal)), got


def test_an_update_of_no_entry_is_an_error_at_the_server():
    server = ParameterServer(kept(1), SGD, staleness=0)
    new = Aux(updates={"stats": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"has \['w'\], but the loss updates"):
        server.give(server.take("a").ticket, done(0)._replace(aux=new))


def test_a_gradient_that_does_not_fit_loses_no_batch():
    server = ParameterServer(kept(1), SGD, staleness=0)
    work = server.take("a")
    with pytest.raises(ValueError):
        server.give(work.ticket, Done({"v": jnp.ones(3)}, Aux(), 0.0, 1))
    assert not server.give(work.ticket, done(0))
    again = server.take("b")
    assert again.batch == 0 and server.give(again.ticket, done(0))
    assert server.finished


def test_a_lease_that_no_batch_keeps_is_an_error_and_not_an_endless_run():
    clock = Clock()
    server = ParameterServer(kept(2), SGD, staleness=0, lease=1, clock=clock)

    def late(times):
        for _ in range(times):
            work = server.take("slow")
            clock.now += 11.0
            assert not server.give(work.ticket, done(work.batch))

    late(MOST_LATE - 1)
    work = server.take("quick")
    assert server.give(work.ticket, done(work.batch))
    late(MOST_LATE)  # an update begins the count anew
    for name in ("slow", "quick"):  # all of them hear of it
        with pytest.raises(ValueError, match="late 5 times .* the lease is 1 s"):
            server.take(name)


def test_errors():
    with pytest.raises(ValueError, match="got -1, 0.04 and 60"):
        ParameterServer(kept(1), SGD, staleness=-1)
    with pytest.raises(ValueError, match="got 0 steps"):
        kept(0)
