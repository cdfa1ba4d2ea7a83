import pytest
from hypothesis import given, strategies as st

from jaxeff.cost import electricity_usd, run_usd, usd_per_million


@given(seconds=st.floats(0, 1e6), price=st.floats(0, 100), n=st.integers(1, 64))
def test_n_devices_cost_n_times_one(seconds, price, n):
    one = run_usd(seconds, usd_per_hour=price)
    assert run_usd(seconds, usd_per_hour=price, devices=n) == pytest.approx(n * one)


def test_an_hour_costs_the_price_of_an_hour():
    assert run_usd(3600, usd_per_hour=2.5) == 2.5
    assert electricity_usd(3.6e6, usd_per_kwh=0.3) == pytest.approx(0.3)


@given(latency=st.floats(1e-6, 10), batch=st.integers(1, 512))
def test_a_million_predictions_cost_the_time_they_take(latency, batch):
    usd = usd_per_million(latency, batch, usd_per_hour=3.6)
    assert usd * batch == pytest.approx(1000 * latency)


def test_a_building_draws_at_least_what_its_machines_draw():
    assert electricity_usd(3.6e6, usd_per_kwh=1, pue=1.5) == pytest.approx(1.5)
    with pytest.raises(ValueError, match=">= 1"):
        electricity_usd(1, usd_per_kwh=1, pue=0.9)


@pytest.mark.parametrize("price", [-1.0, float("nan")])
def test_a_price_below_zero_is_refused(price):
    with pytest.raises(ValueError, match="price"):
        run_usd(1, usd_per_hour=price)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch"):
        usd_per_million(1.0, 0, usd_per_hour=1)
