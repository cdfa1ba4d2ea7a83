import io

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from rich.console import Console

from jaxeff.cost import (
    compare,
    comparison_table,
    grams_co2,
    profile,
    quantity,
    usd_per_million,
)


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def weights(key, hidden):
    a, b = jr.split(key)
    return {"a": jr.normal(a, (64, hidden)), "b": jr.normal(b, (hidden, 8))}


QUICK = {"repeats": 5, "energy_seconds": 0.05}


def test_a_profile_counts_the_program_and_measures_the_machine(getkey):
    params, x = weights(getkey(), 32), jnp.ones((16, 64))
    found = profile(mlp, params, x, examples=16, **QUICK)
    assert found.parameters == 64 * 32 + 32 * 8
    assert found.bytes == 4 * found.parameters
    matmuls = 2 * 16 * (64 * 32 + 32 * 8)
    assert matmuls <= found.flops <= matmuls + 16 * 32  # and the relu
    assert found.memory.bytes >= found.bytes + x.nbytes
    assert 0 < found.latency.low <= found.latency.median <= found.latency.high
    assert found.energy.low <= found.energy.joules <= found.energy.high


def test_a_row_shares_the_calls_figures_among_its_examples(getkey):
    params, x = weights(getkey(), 32), jnp.ones((16, 64))
    found = profile(mlp, params, x, name="small", examples=16, watts=10.0, **QUICK)
    row = found.row(usd_per_hour=2.0, place="FRA", pue=1.2)
    assert row["name"] == "small"
    assert row["flops"] == round(found.flops / 16)
    assert row["energy_j"] == pytest.approx(found.energy.joules / 16)
    assert row["energy_low"] <= row["energy_j"] <= row["energy_high"]
    assert row["grams_co2"] == grams_co2(row["energy_j"], "FRA", pue=1.2)
    assert row["usd_per_million"] == usd_per_million(
        row["latency_s"], 16, usd_per_hour=2.0
    )
    assert "stated 10 W" in row["energy_method"]
    bare = found.row()
    assert bare["usd_per_million"] is None and bare["grams_co2"] is None


def test_models_are_compared_under_their_names_in_their_order(getkey):
    x = jnp.ones((4, 64))
    models = {
        name: (mlp, weights(getkey(), hidden))
        for name, hidden in [("wide", 256), ("narrow", 16)]
    }
    wide, narrow = compare(models, [x], examples=4, repeats=5, energy_seconds=None)
    assert (wide.name, narrow.name) == ("wide", "narrow")
    assert wide.parameters == 16 * narrow.parameters
    assert wide.flops > 10 * narrow.flops
    assert wide.energy is None and wide.row()["energy_j"] is None


def test_what_is_no_array_in_the_parameters_stays_as_it_is(getkey):
    def fn(params, x):
        return x @ params["w"] if params["square"] else x

    params = {"w": jr.normal(getkey(), (8, 8)), "square": True, "name": "layer"}
    found = profile(fn, params, jnp.ones((2, 8)), **QUICK)
    assert found.parameters == 64
    assert found.flops == 2 * 2 * 8 * 8


def test_shapes_in_place_of_arrays_are_refused_with_the_way_out():
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    with pytest.raises(ValueError, match="costs"):
        profile(lambda w, x: w @ x, shape, jnp.ones((4, 4)))


@pytest.mark.parametrize(
    "models, options", [({}, {}), ({"a": (mlp, {})}, {"examples": 0})]
)
def test_nothing_to_compare_is_refused(models, options):
    with pytest.raises(ValueError):
        compare(models, [], **options)


def test_the_table_shows_units_and_ratios_to_the_first_row(getkey):
    x = jnp.ones((4, 64))
    models = {
        name: (mlp, weights(getkey(), hidden))
        for name, hidden in [("dense", 128), ("half", 64)]
    }
    profiles = compare(models, [x], examples=4, watts=10.0, **QUICK)
    stream = io.StringIO()
    accuracy = {"accuracy": ["99 %", "98 %"]}
    table = comparison_table(profiles, first=accuracy, last={"price": ["2", "1"]})
    Console(file=stream, width=140).print(table)
    text = stream.getvalue()
    assert "dense" in text and "half" in text
    assert "36.9 kB" in text and "18.4 kB" in text and "×0.5" in text
    assert "stated 10 W" in text and "median of 5 calls" in text
    assert table.row_count == 2
    assert text.index("accuracy") < text.index("size") < text.index("price")
    assert "98 %" in text


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0, "B", "0 B"),
        (999.4, "B", "999 B"),
        (999.6, "B", "1 kB"),
        (1_234_567, "B", "1.23 MB"),
        (4.2e-7, "s", "420 ns"),
        (12_600_000, "", "12.6 M"),
        (None, "s", "–"),
        (float("nan"), "s", "–"),
        (float("inf"), "s", "–"),
    ],
)
def test_a_quantity_has_three_digits_and_a_prefix(value, unit, text):
    assert quantity(value, unit) == text
