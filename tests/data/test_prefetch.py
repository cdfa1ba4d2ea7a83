import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff.data import prefetch


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def counted(log, n=10**9):
    try:
        for i in range(n):
            log.append(i)
            yield {"x": np.full(2, i)}
    finally:
        log.append("closed")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_batch_arrives_once_and_in_order(depth):
    log = []
    got = [int(b["x"][0]) for b in prefetch(counted(log, 20), depth=depth)]
    assert got == list(range(20))
    assert log[-1] == "closed" and not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_consumer_that_stops_early_leaves_no_thread(depth):
    for _ in range(20):  # the race between stopping and putting, many times
        log = []
        stream = prefetch(counted(log), depth=depth)
        next(stream)
        stream.close()
        assert log[-1] == "closed" and not threads()


def test_a_dropped_iterator_leaves_no_thread():
    log = []
    for _ in prefetch(counted(log)):
        break
    assert log[-1] == "closed" and not threads()


def test_an_iterator_never_asked_starts_nothing():
    log = []
    prefetch(counted(log))
    assert log == [] and not threads()


def test_the_thread_runs_ahead_by_depth_and_no_further():
    log = []
    stream = prefetch(counted(log), depth=3)
    next(stream)
    deadline = time.monotonic() + 10
    # One taken, three waiting, one in the thread's hands.
    while len(log) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert log == [0, 1, 2, 3, 4]
    stream.close()


def test_an_error_arrives_where_the_next_batch_was_due():
    def failing():
        yield np.zeros(2)
        raise OSError("the disk is gone")

    stream = prefetch(failing())
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not threads()


def test_batches_arrive_as_the_sharding_says():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    (batch,) = prefetch([{"x": np.arange(16), "y": np.ones((8, 3))}], sharding)
    assert batch["x"].sharding == sharding and batch["y"].sharding == sharding
    assert np.array_equal(batch["x"], np.arange(16))


def test_a_batch_that_does_not_divide_is_an_error_of_the_consumer():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with pytest.raises(ValueError, match="12"):
        next(prefetch([np.arange(12)], NamedSharding(mesh, P("data"))))


def test_a_depth_below_one_is_an_error_at_once():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prefetch([], depth=0)
