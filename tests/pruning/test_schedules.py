import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.pruning import one_shot, periodic, polynomial
from jaxeff.pruning.schedules import final_sparsity


@given(sparsity=st.floats(0, 0.999), at=st.integers(0, 50))
def test_one_shot_is_nothing_before_its_step_and_all_from_there_on(sparsity, at):
    values = np.asarray(jax.vmap(one_shot(sparsity, at))(jnp.arange(60)))
    assert np.all(values == np.where(np.arange(60) < at, 0, np.float32(sparsity)))


@given(
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 0.999),
    begin=st.integers(0, 20),
    rises=st.integers(1, 12),
    every=st.integers(1, 9),
    power=st.sampled_from([0.5, 1, 2, 3]),
)
def test_polynomial_rises_in_stairs_from_start_to_end(
    start, end, begin, rises, every, power
):
    n = rises * every
    schedule = polynomial(start, end, begin=begin, steps=n, every=every, power=power)
    values = np.asarray(jax.vmap(schedule)(jnp.arange(150)))
    assert np.all(values[:begin] == 0)
    assert values[begin] == np.float32(start)
    assert np.all(values[begin + n :] == np.float32(end))
    assert np.all(np.diff(values[begin:]) >= 0)
    assert np.all((values >= 0) & (values < 1))
    stairs = values[begin : begin + n].reshape(rises, every)
    assert np.all(stairs == stairs[:, :1])


def test_polynomial_is_equation_1_of_the_paper():
    schedule = polynomial(0.1, 0.9, begin=100, steps=60, every=20)
    for k in range(4):
        t, t0, n, dt = 100 + 20 * k, 100, 3, 20
        paper = 0.9 + (0.1 - 0.9) * (1 - (t - t0) / (n * dt)) ** 3
        for within in (0, 7, 19):
            assert float(schedule(t + within)) == pytest.approx(paper, abs=1e-6)


def test_power_1_is_a_straight_line():
    values = jax.vmap(polynomial(0, 0.8, begin=0, steps=8, power=1))(jnp.arange(9))
    assert jnp.allclose(values, 0.1 * jnp.arange(9), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": -0.1}, r"start .* in \[0, 1\)"),
        ({"end": 1.0}, r"end .* in \[0, 1\).*For 80 percent write 0.8"),
        ({"end": 80}, r"end .* in \[0, 1\)"),
        ({"start": 0.9, "end": 0.5}, "Exchange them"),
        ({"begin": -1}, "begin counts steps and is at least 0, got -1"),
        ({"steps": 0}, "steps counts steps and is at least 1, got 0"),
        ({"every": 0}, "every counts steps"),
        ({"every": 30}, "every must divide steps.*steps=90 fits"),
        ({"every": 200}, "every must divide steps.*steps=200 fits"),
        ({"power": 0}, "power must be > 0"),
    ],
)
def test_a_polynomial_out_of_range_is_refused(options, says):
    good = {"start": 0.0, "end": 0.8, "begin": 10, "steps": 100, "every": 10}
    polynomial(**good)
    with pytest.raises(ValueError, match=says):
        polynomial(**{**good, **options})


@pytest.mark.parametrize("bad", [(-0.1, 0), (1.0, 0), (0.5, -1), (float("nan"), 0)])
def test_a_one_shot_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="got (-0.1|1.0|-1|nan)"):
        one_shot(*bad)


@given(
    fraction=st.floats(0, 0.9),
    begin=st.integers(0, 20),
    every=st.integers(1, 9),
    times=st.integers(1, 8),
)
def test_periodic_drops_a_fraction_of_what_is_left_each_time(
    fraction, begin, every, times
):
    schedule = periodic(fraction, begin=begin, every=every, times=times)
    values = np.asarray(jax.vmap(schedule)(jnp.arange(100)))
    left = 1.0
    assert np.all(values[:begin] == 0)
    for k in range(times):
        left *= 1 - fraction
        stair = values[begin + k * every : begin + (k + 1) * every]
        assert np.allclose(stair, 1 - left, atol=1e-6)
    assert np.allclose(values[begin + times * every :], 1 - left, atol=1e-6)


def test_the_end_of_a_schedule_is_known_while_tracing():
    for schedule, end in [
        (one_shot(0.5, 1000), 0.5),
        (polynomial(0, 0.75, begin=3, steps=100, every=10), 0.75),
        (periodic(0.5, begin=3, every=100, times=2), 0.75),
    ]:
        found = []
        jax.jit(lambda s=schedule, f=found: f.append(final_sparsity(s)))()
        assert found == [end]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction": 1.0}, r"fraction .* in \[0, 1\)"),
        ({"begin": -1}, "begin counts steps and is at least 0"),
        ({"every": 0}, "every counts steps and is at least 1"),
        ({"times": 0}, "times counts steps and is at least 1"),
    ],
)
def test_a_periodic_schedule_out_of_range_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        periodic(**{"fraction": 0.2, "begin": 0, "every": 1, "times": 3, **options})
