"""Ranges of activations from data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import lift_report
from jaxeff.quantization import fp8, int8, quantize, w8a8
from jaxeff.quantization.ranges import _histogram, _together, BINS

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
PARAMS = {"a": draw(6, 5), "b": draw(5, 4)}
# A batch of ordinary size, and one with a value far out.
BATCHES = [(draw(500, 6),), (draw(500, 6).at[3, 2].set(30.0),)]


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def static(range, base=int8, grid="int8"):
    return base.with_activations(grid, range=range)


def scale_of(range, path="a", **more):
    formats = {"*": static(range, **more)}
    _, q = quantize(mlp, PARAMS, BATCHES[0][0], formats=formats, batches=BATCHES)
    return float(q[path].x_scale.squeeze()), q


def test_the_range_reaches_what_it_is_named_for():
    tops = [float(jnp.abs(x).max()) for (x,) in BATCHES]
    assert scale_of("minmax")[0] == pytest.approx(max(tops) / 127, rel=1e-6)
    assert scale_of("average")[0] == pytest.approx(np.mean(tops) / 127, rel=1e-6)
    all = np.abs(np.concatenate([x for (x,) in BATCHES]))
    within = scale_of(99.0)[0] * 127
    # To a bin of the histogram.
    assert np.quantile(all, 0.99) <= within <= np.quantile(all, 0.99) + 30 / 2048 * 1.01
    hidden = scale_of("minmax", "b")[0] * 127
    assert 0.99 < hidden <= 1  # of a tanh


@pytest.mark.parametrize("grid", ["int8", "int4", "int3"])
def test_mse_is_the_scale_of_least_error(grid):
    scale, q = scale_of("mse", grid=grid)
    x = np.concatenate([x for (x,) in BATCHES]).ravel()
    top = 2 ** (int(grid[3:]) - 1) - 1

    def error(s):
        return np.mean((np.clip(np.round(x / s), -top, top) * s - x) ** 2)

    best = min(error(s) for s in np.linspace(0.05, 30, 1500) / top)
    assert error(scale) <= 1.05 * best


def test_entropy_ignores_the_few_far_out():
    assert scale_of("entropy")[0] < 0.5 * scale_of("minmax")[0]


@pytest.mark.parametrize("range", ["minmax", "average", "mse", "entropy", 99.9])
@pytest.mark.parametrize("base, grid", [(int8, "int8"), (fp8, "e4m3")], ids=str)
def test_the_model_is_near_and_multiplies_codes(range, base, grid):
    formats = {"*": static(range, base, grid)}
    x = BATCHES[0][0]
    fn, q = quantize(mlp, PARAMS, x, formats=formats, batches=BATCHES)
    assert all(e.native for e in lift_report(fn, q, x))
    y = mlp(PARAMS, x)
    assert float(jnp.linalg.norm(fn(q, x) - y) / jnp.linalg.norm(y)) < 0.12


@pytest.mark.parametrize("range", ["minmax", "average", "mse", "entropy", 99.0])
def test_slices_of_a_scan_have_ranges_of_their_own(range):
    sizes = jnp.array([1.0, 10.0, 100.0])[:, None, None]
    stacked = {"a": sizes * draw(3, 6, 6)}
    fn = lambda p, x: jax.lax.scan(
        lambda x, p: (jnp.sin(x @ p["a"]) * (1 + jnp.abs(p["a"]).max()), None), x, p
    )[0]
    batches = [(draw(400, 6) / 100,), (draw(400, 6) / 300,)]
    formats = static(range)
    _, q = quantize(fn, stacked, *batches[0], formats=formats, batches=batches)
    assert q["a"].x_scale.shape == (3, 1, 1)
    inputs, alone = [x for (x,) in batches], []
    for w in stacked["a"]:  # the range of a layer that is the whole model
        data = [(x,) for x in inputs]
        one = {"formats": formats, "batches": data}
        _, layer = quantize(lambda p, x: x @ p["a"], {"a": w}, *data[0], **one)
        alone.append(float(layer["a"].x_scale.squeeze()))
        inputs = [jnp.sin(x @ w) * (1 + jnp.abs(w).max()) for x in inputs]
    # Where rounding puts a few numbers into the next bin, another one of the ranges
    # that are tried may be the best.
    np.testing.assert_allclose(q["a"].x_scale.ravel(), alone, rtol=0.03)
    assert alone[2] > 100 * alone[0]


def test_many_batches_make_the_histogram_of_all_numbers():
    x = np.abs(RNG.normal(size=(3, 5000)) * [[0.1], [1.0], [1.7]])
    seen = [_histogram(jnp.asarray(row, jnp.float32)) for row in x]
    tops, counts = (np.stack(c) for c in zip(*seen, strict=True))
    total, end = _together(tops.astype(np.float64), counts)
    assert end == pytest.approx(x.max(), rel=1e-6) and total.sum() == x.size
    below = np.searchsorted(np.sort(x.ravel()), end * np.arange(1, BINS + 1) / BINS)
    # To what lies in a bin of one of the batches.
    assert np.abs(np.cumsum(total) - below).max() <= counts.max(1).sum()


def test_a_bin_counts_more_than_a_float32_can():
    n = 2**24 + 10
    count = jax.jit(lambda: _histogram(jnp.zeros(n))[1])()
    assert int(count[0]) == n
    total, _ = _together(np.zeros(200), np.tile(np.asarray(count), (200, 1)))
    assert total.sum() == 200 * n  # more than 32 bits hold


def test_a_weight_used_twice_has_the_larger_range():
    fn = lambda p, x: (x @ p["w"]) + (10 * x @ p["w"])
    params, x = {"w": draw(6, 5)}, draw(50, 6)
    _, q = quantize(fn, params, x, formats=static("minmax"), batches=[(x,)])
    assert float(q["w"].x_scale.squeeze()) == pytest.approx(
        10 * float(jnp.abs(x).max()) / 127, rel=1e-6
    )


def test_without_data_or_with_what_is_not_finite_it_is_one_clear_line():
    x = BATCHES[0][0]
    with pytest.raises(ValueError, match="range of what a meets.*give `batches=`"):
        quantize(mlp, PARAMS, x, formats=static("mse"))
    bad = x.at[1, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="flows into a at .* is not finite"):
        quantize(mlp, PARAMS, x, formats=static("mse"), batches=[(bad,)])
    for batches in ([x], [x[:1]], x):  # would be taken for several arguments, or one
        with pytest.raises(ValueError, match=r"a batch is a tuple .* write `\(x,\)`"):
            formats = static("minmax")
            quantize(mlp, PARAMS, x, formats=formats, batches=iter(batches))
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="range of activations needs the values of"):
        quantize(mlp, shapes, x, formats=static("minmax"), batches=[(x,)])
    _, q = quantize(mlp, PARAMS, x, formats=w8a8)  # needs none
    assert q["a"].x_scale is None


def test_inputs_of_zeros_have_a_scale():
    x = jnp.zeros((5, 6))
    for range in ("minmax", "mse", "entropy", 99.0):
        fn, q = quantize(mlp, PARAMS, x, formats=static(range), batches=[(x,)])
        assert np.isfinite(fn(q, x)).all() and float(q["a"].x_scale.squeeze()) > 0
