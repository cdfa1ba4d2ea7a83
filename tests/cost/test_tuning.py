import dataclasses
import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import models
from jaxeff.cost import Latency, tune_convolutions, tuning
from jaxeff.program import describe, equations, rebuild
from jaxeff.quantization import quantize

LAYOUTS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (2, 9, 9, 3), (3, 3, 3, 5)),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (2, 3, 9, 9), (5, 3, 3, 3)),
    "1D": (("NWC", "WIO", "NWC"), (2, 9, 3), (3, 3, 5)),
}
WINDOWS = {
    "plain": {"window_strides": 1},
    "strided": {"window_strides": 2},
    "transposed": {"window_strides": 1, "lhs_dilation": 2},
    "dilated": {"window_strides": 1, "rhs_dilation": 2},
}


def loop(params, x):
    """A convolution of 3 channels in a scan, one of 3 -> 5 after it."""
    same = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(same(x, w)), None), x, params["loop"])
    return same(x, params["out"])


LOOP = {
    "loop": jr.normal(jr.key(0), (4, 3, 3, 3, 3)) / 3,  # or tanh is at its ends
    "out": jr.normal(jr.key(1), (3, 3, 3, 5)),
}


def timed(monkeypatch, seconds):
    """Makes a convolution of that many channels take that long."""

    def measure(thunks, **options):
        of = lambda name: seconds.get(name, 10.0)
        return {name: Latency(of(name), of(name), of(name), 1) for name in thunks}

    monkeypatch.setattr(tuning, "measure_latency", measure)


def tuned(fn, *args, to=8):
    """Every convolution padded to 8 channels, whatever its time."""
    with pytest.MonkeyPatch.context() as patch:
        timed(patch, {})
        found = tune_convolutions(fn, *args)
    padded = tuple((m.convolution, (to, to)) for m in found.measured)
    assert padded
    return dataclasses.replace(found, padded=padded)


def kernels(fn, *args):
    """(in, out) channels of the convolutions in the program of a function."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    named = [(e.primitive.name, e) for _, e, _ in equations(jaxpr)]
    found = [e for name, e in named if name == "conv_general_dilated"]
    dims = [e.params["dimension_numbers"].rhs_spec for e in found]
    shapes = [e.invars[1].aval.shape for e in found]
    return [(s[d[1]], s[d[0]]) for s, d in zip(shapes, dims, strict=True)]


def assert_same(got, want):
    """Equal to the rounding of float32, of the largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_same_function_and_gradient(layout, window):
    spec, image, kernel = LAYOUTS[layout]
    n = len(image) - 2
    options = {k: (v,) * n for k, v in WINDOWS[window].items()}

    def fn(w, x):
        return jax.lax.conv_general_dilated(
            x, w, padding=((1, 2),) * n, dimension_numbers=spec, **options
        )

    w, x = jr.normal(jr.key(0), kernel), jr.normal(jr.key(1), image)
    fast = tuned(fn, w, x)
    assert kernels(fast, w, x) == [(8, 8)] and kernels(fn, w, x) == [(3, 5)]
    assert_same(fast(w, x), fn(w, x))
    grad = lambda f: jax.grad(lambda w, x: jnp.sum(jnp.sin(f(w, x))), (0, 1))
    assert_same(grad(fast)(w, x), grad(fn)(w, x))


def test_batch_stays_free_and_other_images_run_as_written():
    x = jr.normal(jr.key(2), (2, 8, 8, 3))
    fast = tuned(loop, LOOP, x)
    more = jnp.concatenate([x, x, x])
    assert set(kernels(fast, LOOP, more)) == {(8, 8)}
    assert_same(fast(LOOP, more), loop(LOOP, more))
    other = x[:, :6]
    assert set(kernels(fast, LOOP, other)) == {(3, 3), (3, 5)}


def test_convolutions_in_loops_and_under_transformations():
    x = jr.normal(jr.key(2), (2, 8, 8, 3))
    fast = tuned(loop, LOOP, x)
    assert [m.count for m in fast.measured] == [1, 1]  # the body stands there once
    assert_same(jax.jit(fast)(LOOP, x), loop(LOOP, x))
    many = jnp.stack([x, 2 * x])
    over = lambda f: jax.vmap(f, (None, 0))(LOOP, many)
    assert_same(over(fast), over(loop))


def test_a_training_step_is_a_function_too():
    x = jr.normal(jr.key(2), (2, 8, 8, 3))
    grad = jax.grad(lambda p, x: jnp.sum(loop(p, x) ** 2))
    fast = tuned(grad, LOOP, x)
    assert len(fast.measured) > 2  # those of the backward pass
    assert_same(fast(LOOP, x), grad(LOOP, x))


@pytest.mark.slow
def test_quantized_leaves_multiply_in_their_own_way():
    model = models.build("cnn", stages=((5, 1), (6, 1)))
    x = jr.normal(jr.key(0), (2, 8, 8, 1))
    params = model.init(jr.key(1), x)
    fn, small = quantize(model.apply, params, x[:1])
    assert_same(tuned(fn, small, x)(small, x), fn(small, x))


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [
        ({"(3, 5)": 1.0, "(4, 5)": 0.5, "(4, 8)": 0.4}, (4, 8)),
        ({"(3, 5)": 1.0, "(4, 5)": 0.95}, (3, 5)),  # may be noise
        ({"(3, 5)": 1.0}, (3, 5)),
    ],
)
def test_what_is_clearly_faster_is_kept(monkeypatch, seconds, runs):
    timed(monkeypatch, seconds)
    fn = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    fast = tune_convolutions(fn, w, x)
    assert kernels(fast, w, x) == [runs]
    [measured] = fast.measured
    assert measured.seconds == 1.0 and measured.best == min(
        s for s in (1.0, seconds[str(runs)])
    )
    shown = "4 -> 8" if runs == (4, 8) else "written"
    assert "3 -> 5, 8x8 by 3x3" in str(fast) and shown in str(fast)


def test_shapes_suffice():
    shape = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LOOP)
    assert len(tune_convolutions(loop, params, shape, repeats=1).measured) == 2


def test_groups_stay_and_nothing_to_tune_is_an_error():
    fn = lambda w, x: jax.lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    with pytest.raises(ValueError, match="has none"):
        tune_convolutions(fn, jnp.ones((3, 3, 1, 3)), jnp.ones((1, 8, 8, 3)))


def test_multiples_of_eight_are_not_measured():
    fn = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    w, x = jnp.ones((3, 3, 8, 16)), jnp.ones((1, 8, 8, 8))
    same = tune_convolutions(fn, w, x)
    assert same.measured == () and same.aligned == 1
    assert kernels(same, w, x) == [(8, 16)]


def test_a_saved_model_stays_tuned():
    x = jr.normal(jr.key(2), (2, 8, 8, 3))
    fast = tuned(loop, LOOP, x)
    about = json.loads(json.dumps(describe(fast, LOOP)))
    again, _ = rebuild(about, loop, LOOP)
    assert kernels(again, LOOP, x) == kernels(fast, LOOP, x)
    assert_same(again(LOOP, x), fast(LOOP, x))
