"""Every way to multiply by a weight in few bits computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import Dot, DotDims
from jaxeff.quantization import (
    forms,
    int2,
    int3,
    int4,
    int8,
    kernels,
    log4,
    log4_sqrt2,
    mxfp4,
    nf4,
    quantize,
    quantize_array,
    uint4,
    w8a8,
)

FORMATS = [
    int8,
    int4,
    int3,
    int2,
    uint4,
    log4,
    log4_sqrt2,
    int8.grouped(32),
    int4.grouped(32),
    uint4.grouped(32),
    nf4.grouped(32),
    mxfp4,
    int4.per_tensor(),
]
HIGHEST = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": None}
# dims of the weight that are summed and batched, the weight's shape, that of x
LAYOUTS = {
    "inputs first": ((0,), (), (64, 256), DotDims((1,), (0,), (), ()), (5, 64)),
    "outputs first": ((1,), (), (256, 64), DotDims((1,), (1,), (), ()), (5, 64)),
    "heads": ((0, 1), (), (2, 32, 256), DotDims((1, 2), (0, 1), (), ()), (5, 2, 32)),
    "to heads": ((0,), (), (64, 4, 256), DotDims((2,), (0,), (), ()), (2, 3, 64)),
    "batch": ((1,), (0,), (3, 64, 256), DotDims((2,), (1,), (0,), (0,)), (3, 5, 64)),
}


def problem(layout, fmt, dtype=jnp.float32, weight_first=False):
    contract, batch, shape, dims, x_shape = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s), dtype)
    q = quantize_array(draw(shape), fmt, contract, batch)
    return q, draw(x_shape), Dot(dims, weight_first, HIGHEST)


FAST = [("inputs first", f) for f in FORMATS] + [(n, int4) for n in LAYOUTS]
CASES = [
    pytest.param(n, f, marks=[] if (n, f) in FAST else pytest.mark.slow)
    for n in LAYOUTS
    for f in FORMATS
]


@pytest.mark.parametrize("layout, fmt", CASES, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("weight_first", [False, True])
def test_every_form_is_the_product(layout, fmt, weight_first):
    q, x, dot = problem(layout, fmt, weight_first=weight_first)
    want = dot(x, q.dense())
    found = q.forms(x, dot)
    assert "128 outputs at a time" in found
    for name, run in found.items():
        got = jax.jit(run)()
        assert got.shape == want.shape and got.dtype == want.dtype, name
        # bfloat16 parts are summed in another order than float32 products.
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_forms_there_are_depend_on_how_a_weight_is_stored():
    def names(fmt, **options):
        q, x, dot = problem("inputs first", fmt, **options)
        return set(q.forms(x, dot))

    both = {"decoded first", "in bfloat16 parts"}
    assert both <= names(int8) and "byte by byte" not in names(int8)
    assert both | {"byte by byte"} <= names(int4)
    assert "byte by byte" not in names(int3)  # eight lie in three bytes
    assert not both & names(int4.grouped(32))  # that is decoded first anyway
    assert "in bfloat16 parts" not in names(
        log4_sqrt2
    )  # its numbers are not exact there
    assert "in bfloat16 parts" not in names(int8, dtype=jnp.bfloat16)
    assert not names(w8a8)  # its activations are rounded: another function


def test_parts_in_bfloat16_are_as_exact_as_float32():
    q, x, dot = problem("inputs first", int8)
    exact = np.asarray(x, np.float64) @ np.asarray(q.dense(), np.float64)
    off = lambda y: np.abs(y - exact).max() / np.abs(exact).max()
    assert off(q.forms(x, dot)["in bfloat16 parts"]()) < 1e-6
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
    assert off(dot(rounded, q.dense())) > 1e-4


def test_zero_points_that_are_no_integers_are_not_split_into_parts():
    params, x = {"w": problem("inputs first", uint4)[0].dense()}, jnp.ones((5, 64))
    q = quantize(lambda p, x: x @ p["w"], params, x, formats=uint4, fit="hqq")[1]["w"]
    dot = problem("inputs first", uint4)[2]
    x = problem("inputs first", uint4)[1]
    want = dot(x, q.dense())
    found = q.forms(x, dot)
    assert "in bfloat16 parts" not in found and "byte by byte" in found
    for run in found.values():
        np.testing.assert_allclose(run(), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("fmt", [int8, int4.grouped(32)], ids=lambda f: f.name)
def test_weights_of_bfloat16_are_multiplied_in_as_many_bits(fmt):
    q, x, dot = problem("inputs first", fmt, dtype=jnp.bfloat16)
    wide = {**HIGHEST, "preferred_element_type": jnp.float32}
    dot = dataclasses.replace(dot, params=wide)
    want = q.dot(x, dot)
    for name, run in q.forms(x, dot).items():
        off = np.abs(run() - want).max()
        assert off < 2e-5 * np.abs(want).max(), name


def test_what_is_too_large_for_bfloat16_is_no_nan():
    q, x, dot = problem("inputs first", int8)
    x = x.at[0, 0].set(3.4e38).at[1, 1].set(jnp.inf)
    got, want = q.forms(x, dot)["in bfloat16 parts"](), q.dot(x, dot)
    np.testing.assert_array_equal(jnp.isnan(got[2:]), jnp.isnan(want[2:]))
    assert not np.isnan(got[0]).all()


def test_on_a_tpu_the_kernel_is_a_form_with_the_derivative_of_the_product(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, x, dot = problem("inputs first", int4)
    assert "kernel" in q.forms(x, dot)
    run = lambda x: forms.by_kernel(q, x, dot, interpret=True)
    slope = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)
    want = slope(lambda x: dot(x, q.dense()))
    np.testing.assert_allclose(slope(run), want, atol=3e-5 * np.abs(want).max())
    assert forms.by_kernel(q, x[:0], dot, interpret=True).shape == (0, 256)


@pytest.mark.parametrize("fmt", [int8, int4, int4.grouped(32)], ids=lambda f: f.name)
def test_forms_have_the_derivative_of_the_product(fmt):
    q, x, dot = problem("inputs first", fmt)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(dot(x, q.dense()))))(x)
    for name in q.forms(x, dot):
        got = jax.grad(lambda x, n=name: jnp.sum(jnp.sin(q.forms(x, dot)[n]())))(x)
        np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("layout", ["inputs first", "heads", "to heads"])
@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("fmt", [int8, int4, int4.grouped(32)], ids=lambda f: f.name)
def test_the_kernel_is_the_product(layout, fmt, weight_first):
    q, x, dot = problem(layout, fmt, weight_first=weight_first)
    assert not forms.unfit(q, dot)
    got = forms.by_kernel(q, x, dot, interpret=True)
    want = dot(x, q.dense())
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


UNFIT = {
    "batch": ("batch", int8, "inputs by outputs"),
    "outputs first": ("outputs first", int8, "inputs by outputs"),
    "zero point": ("inputs first", uint4, "symmetric integers"),
    "numbers": ("inputs first", nf4.grouped(32), "symmetric integers"),
    "width": ("inputs first", int3, "no bytes or halves"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_kernel_cannot_take_it_says(name):
    layout, fmt, why = UNFIT[name]
    q, _, dot = problem(layout, fmt)
    assert why in forms.unfit(q, dot)


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("layout", ["inputs first", "heads", "to heads", "batch"])
@pytest.mark.parametrize("fmt", [w8a8, int4.with_activations("int4")])
def test_rows_rounded_by_a_kernel_give_the_same_product(
    fmt, layout, weight_first, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, x, dot = problem(layout, fmt, weight_first=weight_first)
    assert list(q.forms(x, dot)) == ["rows rounded by a kernel"]
    run = lambda x: forms.by_rows(q, x, dot, interpret=True)
    np.testing.assert_array_equal(run(x), q.dot(x, dot))
    slope = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)
    np.testing.assert_array_equal(slope(run), slope(lambda x: q.dot(x, dot)))


def test_rows_that_no_kernel_rounds_have_no_form(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, x, dot = problem("inputs first", w8a8)
    assert q.forms(x, dot)
    for fmt, why in [
        (int8.with_activations("e4m3"), "symmetric integers"),
        (int8.grouped(32).with_activations("int8"), "no scale that is found"),
    ]:
        q, x, dot = problem("inputs first", fmt)
        assert why in forms.unfit_rows(q, x, dot) and not q.forms(x, dot)
    q, x, dot = problem("inputs first", w8a8)
    turned = dataclasses.replace(dot, dims=DotDims((0,), (0,), (), ()))
    assert "not the last" in forms.unfit_rows(q, x.T, turned)
    static = dataclasses.replace(q, x_scale=jnp.ones((1, 1)))
    assert "no scale" in forms.unfit_rows(static, x, dot)
    assert "of a step" in kernels.unfit_rows(2**18)
