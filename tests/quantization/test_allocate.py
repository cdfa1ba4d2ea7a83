"""A format for each weight under a budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff import tree
from jaxeff.lowrank import factorize
from jaxeff.quantization import int2, int4, int8, quantize, sensitivity
from jaxeff.quantization.allocate import _hull, Option, Sensitivity

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


def sums(options):
    return sum(o.bytes for o in options), sum(o.loss for o in options)


def stops_at_once(hulls, budget, of):
    """Steps along the hulls, best bargains first, until one does not fit."""
    at = dict.fromkeys(hulls, 0)
    steps = sorted(
        ((b[1 - of] - a[1 - of]) / (b[of] - a[of]), path)
        for path, hull in hulls.items()
        for a, b in zip(hull, hull[1:], strict=False)
    )
    total = lambda i: sum(hull[at[p]][i] for p, hull in hulls.items())
    for _, path in steps:
        at[path] += 1
        if total(of) > budget:
            at[path] -= 1
            break
    return total(0), total(1)


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
    hulls = {
        path: [(o.bytes, o.loss) for o in _hull(options)]
        for path, options in found.options.items()
    }
    smallest = sum(o[0].bytes for o in found.options.values())
    largest = sum(o[-1].bytes for o in found.options.values())
    for budget in np.linspace(smallest, largest, 7):
        formats = found.within(at_most_bytes=budget)
        spent, loss = sums(picked(found, formats))
        assert spent <= budget
        # Where every step fits until all is spent, nothing is passed over.
        steps = stops_at_once(hulls, budget, 0)
        assert loss <= steps[1]
        formats = found.within(at_most_bytes=steps[0])
        spent, loss = sums(picked(found, formats))
        assert (spent, loss) == steps
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


@given(st.integers(0, 10**6))
def test_what_is_left_of_a_budget_admits_no_further_step(seed):
    rng = np.random.default_rng(seed)
    options = {}
    for path in "abc":  # bytes and losses in whole numbers, on a convex hull
        steps = np.sort(rng.choice(40, 3, replace=False) + 1) * rng.integers(1, 20)
        losses = [*np.cumsum(steps)[::-1], 0]
        sizes = np.cumsum(rng.integers(1, 20) * np.ones(4, int))
        options[path] = tuple(
            Option(path, f, int(size), float(loss))
            for f, size, loss in zip([*FORMATS, None], sizes, losses, strict=True)
        )
    found = Sensitivity(options)
    every = [sums(some) for some in itertools.product(*options.values())]
    hulls = {p: [(o.bytes, o.loss) for o in some] for p, some in options.items()}
    for of, name in enumerate(("at_most_bytes", "at_most_loss")):
        ends = [e[of] for e in every]
        budget = float(rng.integers(min(ends), max(ends) + 1))
        pick = picked(found, found.within(**{name: budget}))
        took, other = sums(pick)[of], sums(pick)[1 - of]
        assert took <= budget
        ways = {p: hull[:: 1 - 2 * of] for p, hull in hulls.items()}
        before = stops_at_once(ways, budget, of)
        assert other <= before[1 - of]
        # Until then it is the best for what it takes.
        assert before[1 - of] == min(e[1 - of] for e in every if e[of] <= before[of])
        for o in pick:
            way = ways[o.path]
            i = way.index((o.bytes, o.loss))
            assert i == len(way) - 1 or took + way[i + 1][of] - way[i][of] > budget


def test_a_step_that_does_not_fit_keeps_no_other_weight_back():
    option = lambda path, f, size, loss: Option(path, f, size, loss)
    big = (option("big", int4, 1000, 1000.0), option("big", int8, 2000, 0.0))
    small = (option("small", int4, 10, 5.0), option("small", int8, 20, 0.0))
    found = Sensitivity({"big": big, "small": small})
    assert found.within(at_most_bytes=1900) == {"big": int4, "small": int8}
    cheap = (option("cheap", int4, 10, 50.0), option("cheap", int8, 11, 0.0))
    found = Sensitivity({"big": big, "cheap": cheap})
    assert found.within(at_most_loss=60) == {"big": int8, "cheap": int4}


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
    options = {"formats": [int4, None], "batches": [(X,)]}
    found = sensitivity(fn, PARAMS, X, **options)
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
    options = {"formats": FORMATS, "batches": [(X,)]}
    found = sensitivity(low_fn, low, X, only="a", **options)
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
    with pytest.raises(ValueError, match="0 or more in all, and -1 is allowed"):
        found.within(at_most_loss=-1)
    with pytest.raises(ValueError, match="loss is one number.*shape .* Take its"):
        sensitivity(
            fn, PARAMS, X, formats=int4, batches=[(X,)], loss=lambda y, z: y - z
        )
    with pytest.raises(ValueError, match="got 3 formats and 0 batches"):
        sensitivity(fn, PARAMS, X, formats=FORMATS, batches=[])
    with pytest.raises(ValueError, match="none can be quantized: bias"):
        measured(only="bias")
    for batches in ([X], [X[:1]]):  # would be taken for several arguments, or one
        with pytest.raises(ValueError, match="a batch is a tuple of arguments"):
            sensitivity(fn, PARAMS, X, formats=int4, batches=iter(batches))
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="sensitivity needs the values .* a is only"):
        sensitivity(fn, shapes, X, formats=int4, batches=[(X,)])
    labels = lambda p, x: jnp.argmax(fn(p, x), -1)
    with pytest.raises(ValueError, match="returns none.* give `loss=`"):
        sensitivity(labels, PARAMS, X, formats=int4, batches=[(X,)])
    wrong = lambda y, exact: jnp.mean(y != exact)
    sensitivity(labels, PARAMS, X, formats=int4, batches=[(X,)], loss=wrong)


def test_one_format_is_a_choice_of_one():
    one, several = (
        sensitivity(fn, PARAMS, X, formats=f, batches=[(X,)], only="a")
        for f in (int4, [int4])
    )
    assert one == several


def test_it_runs_one_program_for_all():
    traced = []
    counted = lambda p, x: traced.append(1) or fn(p, x)
    sensitivity(counted, PARAMS, X, formats=FORMATS, batches=[(X,)] * 2)
    # Twice to be run, and once for each format to be looked at.
    assert len(traced) <= 2 + 2 * len(FORMATS)
