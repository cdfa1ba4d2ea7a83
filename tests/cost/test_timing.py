import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.cost import Latency, latency, measure_latency


class FakeClock:
    """A clock that only the fake work advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def thunk():
            self.now += next(seconds)
            return jnp.zeros(())

        return thunk


def test_median_and_quartiles_are_those_of_the_timed_calls():
    clock = FakeClock()
    # The warm-up takes the first, which must not count.
    seconds = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    measured = measure_latency(
        {"a": clock.work(seconds)}, repeats=5, warmup=1, clock=clock
    )
    assert measured["a"] == Latency(median=3.0, low=2.0, high=4.0, repeats=5)


def test_each_round_calls_every_candidate_once_and_starts_with_another():
    calls = []
    thunks = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    measure_latency(thunks, repeats=6, warmup=1)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert [r[0] for r in rounds] == ["a", "b", "c"] * 2


def test_a_slow_stretch_slows_every_candidate_alike():
    clock = FakeClock()
    # The machine is ten times slower for the middle third of the rounds.
    speed = [1.0] * 11 + [10.0] * 10 + [1.0] * 9
    measured = measure_latency(
        {
            "one": clock.work(iter(speed)),
            "two": clock.work(iter([2 * s for s in speed])),
        },
        repeats=29,
        warmup=1,
        clock=clock,
    )
    assert measured["two"].median == pytest.approx(2 * measured["one"].median)


def test_max_seconds_ends_the_rounds_but_not_before_three():
    clock = FakeClock()
    measured = measure_latency(
        {"a": clock.work(itertools.repeat(10.0))},
        repeats=100,
        warmup=1,
        max_seconds=1.0,
        clock=clock,
    )
    assert measured["a"].repeats == 3


def test_latency_waits_for_the_result(getkey):
    # 2 x 600^3 FLOPs take well over 0.1 ms; handing them out does not.
    x = jax.random.normal(getkey(), (600, 600))
    measured = latency(lambda a: a @ a @ a @ a, x, repeats=5)
    assert 1e-4 < measured.low <= measured.median <= measured.high < 60
    assert "5 calls" in measured.method


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": 0}])
def test_a_measurement_without_warmup_or_repeats_is_refused(options):
    with pytest.raises(ValueError, match="must be >= 1"):
        measure_latency({"a": lambda: np.zeros(())}, **options)
