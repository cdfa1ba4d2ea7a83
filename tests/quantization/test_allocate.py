"""A format for each weight under a budget."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.lowrank import factorize
from jaxeff.quantization import int2, int4, int8, quantize, sensitivity
from jaxeff.quantization.allocate import Option, Sensitivity

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_what_it_measures_is_what_rounding_that_weight_alone_does",
    "test_the_factors_of_a_weight_are_measured_one_by_one",
}

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
# The second weight hardly matters, the third a lot.
PARAMS = {"a": draw(16, 32), "b": draw(16, 32) / 50, "c": draw(32, 8), "bias": draw(8)}
X = draw(100, 16)
FORMATS = [int2, int4, int8]


def fn(params, x):
    y = jnp.tanh(x @ params["a"] + x @ params["b"])
    return y @ params["c"] + params["bias"][None]


def measured(**more):
    return sensitivity(fn, PARAMS, X, formats=FORMATS, batches=[(X,)], **more)


def picked(found, formats):
    """The options of those formats."""
    one = lambda p, f: next(o for o in found.options[p] if o.format == f)
    return [one(p, f) for p, f in formats.items()]


def test_what_it_measures_is_what_rounding_that_weight_alone_does():
    found = measured()
    assert set(found.options) == set("abc")
    y = fn(PARAMS, X)
    for path, options in found.options.items():
        for o in options:
            q_fn, q = quantize(fn, PARAMS, X, formats={path: o.format}, fit="mse")
            loss = jnp.sum((q_fn(q, X) - y) ** 2) / jnp.sum(y**2)
            assert o.loss == pytest.approx(float(loss), rel=1e-3)
            assert o.bytes == tree.tree_bytes(q[path])
    text = str(found)
    assert "int2" in text and "loss added" in text


def test_a_budget_is_met_with_the_least_loss():
    found = measured()
    smallest = sum(o[0].bytes for o in found.options.values())
    largest = sum(o[-1].bytes for o in found.options.values())
    for budget in np.linspace(smallest, largest, 7):
        formats = found.within(at_most_bytes=budget)
        pick = picked(found, formats)
        spent, loss = sum(o.bytes for o in pick), sum(o.loss for o in pick)
        assert spent <= budget
        # Of all choices with as many bytes or fewer none is better.
        better = [
            sum(o.loss for o in some)
            for some in itertools.product(*found.options.values())
            if sum(o.bytes for o in some) <= spent
        ]
        assert loss <= min(better) * (1 + 1e-6)
    between = found.within(at_most_bytes=(smallest + largest) / 2)
    assert between["b"].bits < between["c"].bits  # what hardly matters gets fewer
    _, q = quantize(fn, PARAMS, X, formats=between)
    assert q["b"].bits == between["b"].bits


def test_a_loss_is_kept_with_the_fewest_bytes():
    found = measured()
    losses = [sum(o[i].loss for o in found.options.values()) for i in (0, 2)]
    limit = np.sqrt(losses[0] * max(losses[1], 1e-9))
    formats = found.within(at_most_loss=limit)
    assert sum(o.loss for o in picked(found, formats)) <= limit
    tight = found.within(at_most_loss=limit / 10)
    assert sum(f.bits for f in tight.values()) >= sum(f.bits for f in formats.values())


def test_a_loss_of_the_task_and_weights_by_pattern():
    target = fn(PARAMS, X) + 1
    loss = lambda y, exact: jnp.mean((y - target) ** 2)
    found = measured(loss=loss, only=["a", "c"])
    assert set(found.options) == {"a", "c"}
    y = fn(PARAMS, X)
    q_fn, q = quantize(fn, PARAMS, X, formats={"a": int2}, fit="mse")
    expected = jnp.mean((q_fn(q, X) - target) ** 2) - jnp.mean((y - target) ** 2)
    assert found.options["a"][0].loss == pytest.approx(float(expected), rel=1e-3)


def test_a_weight_may_stay_as_it_is():
    given = {"formats": [int4, None], "batches": [(X,)]}
    found = sensitivity(fn, PARAMS, X, **given)
    assert set(found.within(at_most_loss=0.0).values()) == {None}


def test_options_that_others_beat_are_never_taken():
    options = tuple(
        Option("w", f, size, loss)
        for f, size, loss in ((int2, 10, 1.0), (int4, 20, 0.9), (int8, 30, 0.0))
    )
    found = Sensitivity({"w": options})
    assert found.within(at_most_bytes=25) == {"w": int2}  # int4 is no bargain
    assert found.within(at_most_bytes=30) == {"w": int8}


def test_the_factors_of_a_weight_are_measured_one_by_one():
    low_fn, low = factorize(fn, PARAMS, X, ranks={"a": 4})
    given = {"formats": FORMATS, "batches": [(X,)]}
    found = sensitivity(low_fn, low, X, only="a", **given)
    assert set(found.options) == {"a/u", "a/v"}
    formats = found.within(at_most_bytes=10**6)
    quantize(low_fn, low, X, formats=formats)


def test_what_cannot_be_is_one_clear_line():
    found = measured()
    for budget in ({}, {"at_most_bytes": 9, "at_most_loss": 9}):
        with pytest.raises(ValueError, match="give one budget"):
            found.within(**budget)
    with pytest.raises(ValueError, match="smallest formats take .* and 10 are allowed"):
        found.within(at_most_bytes=10)
    with pytest.raises(ValueError, match="finest formats add a loss"):
        found.within(at_most_loss=0.0)
    with pytest.raises(ValueError, match="got 3 formats and 0 batches"):
        sensitivity(fn, PARAMS, X, formats=FORMATS, batches=[])
    with pytest.raises(ValueError, match="none can be quantized: bias"):
        measured(only="bias")


def test_it_runs_one_program_for_all():
    traced = []
    counted = lambda p, x: traced.append(1) or fn(p, x)
    sensitivity(counted, PARAMS, X, formats=FORMATS, batches=[(X,)] * 2)
    # Twice to be run, and once for each format to be looked at.
    assert len(traced) <= 2 + 2 * len(FORMATS)
