"""Every way a weight can stand in a product, against the same product, dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxeff.program import equations, lift, lift_report
from jaxeff.quantization import (
    int4,
    int8,
    Linear,
    log4_sqrt2,
    nf4,
    quantize_array,
    uint4,
    w4a8,
    w8a8,
    w8a8_fp8,
)
from jaxeff.quantization.grids import named
from jaxeff.quantization.products import longest_sum

# (x's shape, w's shape, contracting dims, batch dims) of x and w.
DOTS = {
    "matmul": ((5, 8), (8, 6), ((1,), (0,)), ((), ())),
    "transposed": ((5, 8), (6, 8), ((1,), (1,)), ((), ())),
    "vector": ((8,), (8, 6), ((0,), (0,)), ((), ())),
    "all": ((4, 8), (4, 8), ((0, 1), (0, 1)), ((), ())),
    "two contracted": ((5, 4, 8), (8, 6, 4), ((2, 1), (0, 2)), ((), ())),
    "batch": ((5, 3, 8), (8, 3, 6), ((2,), (0,)), ((1,), (1,))),
    "two batch": ((2, 5, 3, 8), (6, 3, 8, 2), ((3,), (2,)), ((2, 0), (1, 3))),
}
# dimension numbers, x, w, strides, padding, more
CONVS = {
    "nhwc": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 4), (3, 3, 4, 6), (1, 1), {}),
    "strided": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 4), (3, 2, 4, 6), (2, 1), {}),
    "nchw": (("NCHW", "OIHW", "NCHW"), (2, 4, 6, 5), (6, 4, 3, 3), (1, 2), {}),
    "odd order": (("CNWH", "IHWO", "WHCN"), (4, 2, 6, 5), (4, 3, 3, 6), (1, 1), {}),
    "one dim": (("NWC", "WIO", "NWC"), (2, 9, 4), (3, 4, 6), (1,), {}),
    "depthwise": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 6, 5, 4),
        (3, 3, 1, 8),
        (1, 1),
        {"feature_group_count": 4},
    ),
    "grouped, dilated": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 7, 8, 4),
        (3, 3, 2, 6),
        (1, 1),
        {"feature_group_count": 2, "rhs_dilation": (2, 2)},
    ),
    "transposed": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 4, 5, 4),
        (3, 3, 4, 6),
        (1, 1),
        {"lhs_dilation": (2, 2)},
    ),
    "batch groups": (
        ("NHWC", "HWIO", "NHWC"),
        (4, 6, 5, 4),
        (3, 3, 4, 6),
        (1, 1),
        {"batch_group_count": 2},
    ),
}
# Eager JAX would compile each operation for each shape.
quantize_array = jax.jit(quantize_array, static_argnums=(1, 2, 3))


def dot_fn(name, first):
    x_shape, w_shape, (xc, wc), (xb, wb) = DOTS[name]

    def fn(w, x):
        if first:
            return lax.dot_general(w, x, ((wc, xc), (wb, xb)))
        return lax.dot_general(x, w, ((xc, wc), (xb, wb)))

    return fn


def conv_fn(name):
    numbers, x_shape, w_shape, strides, more = CONVS[name]
    pads = [(1, 2)] * len(strides)

    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, strides, pads, dimension_numbers=numbers, **more
        )

    contract = tuple(d for d, c in enumerate(numbers[1]) if c != "O")
    return fn, x_shape, w_shape, contract, numbers[0].index("N")


def jit(generator):
    """Compiles a generator as the function that returns the list of its values."""
    return jax.jit(lambda *args: list(generator(*args)))


def close(pairs):
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=3e-5, atol=3e-5)


def is_native(fn, q, x):
    return [e.native for e in lift_report(fn, q, x)] == [True]


def rounded(x, shared):
    """`x` on the grid of 255 steps that its largest magnitude along `shared` sets."""
    scale = jnp.abs(x).max(shared, keepdims=True) / 127
    return jnp.round(x / scale) * scale


def rounded_in_pairs(x, dim, shared):
    """The same with a grid for each two neighbours along `dim`."""
    pairs = x.reshape(*x.shape[:dim], -1, 2, *x.shape[dim + 1 :])
    moved = [d + (d > dim) for d in shared if d != dim] + [dim + 1]
    # The groups lie along this dim alone: the other contracted dims have their own.
    return rounded(pairs, tuple(moved[-1:])).reshape(x.shape)


@pytest.mark.parametrize("name", DOTS)
def test_a_product_with_the_integers_is_the_product_with_dense(name, normal):
    x_shape, w_shape, (xc, wc), (_, wb) = DOTS[name]
    along = dict(zip(wc, xc, strict=True))[max(wc)]  # groups lie on the last dim

    def run(x, w):
        for fn in (dot_fn(name, first) for first in (False, True)):
            for fmt in (int8, int4.grouped(2)):
                q = quantize_array(w, fmt, wc, wb)
                assert is_native(fn, q, x)
                yield lift(fn)(q, x), fn(q.dense(), x)
            q = quantize_array(w, w4a8, wc, wb)
            assert is_native(fn, q, x)
            # What it computes with: rows rounded to 255 steps.
            yield lift(fn)(q, x), fn(q.dense(), rounded(x, xc))
            q = quantize_array(w, w8a8.grouped(2), wc, wb)
            assert is_native(fn, q, x)
            # Each group is a product of its own, and rounds its own activations.
            yield lift(fn)(q, x), fn(q.dense(), rounded_in_pairs(x, along, xc))

    x, w = normal(*x_shape), normal(*w_shape)
    close(jit(run)(x, w))


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_with_the_integers_is_the_one_with_dense(name, normal):
    fn, x_shape, w_shape, contract, batch = conv_fn(name)
    others = tuple(d for d in range(len(x_shape)) if d != batch)

    def run(x, w):
        for fmt in (int8, int4.grouped(w_shape[max(contract)])):
            q = quantize_array(w, fmt, contract)
            assert is_native(fn, q, x)
            yield lift(fn)(q, x), fn(q.dense(), x)
        q = quantize_array(w, w4a8, contract)
        # With groups in the batch one output has several examples: no one scale.
        native = "batch_group_count" not in CONVS[name][-1]
        assert is_native(fn, q, x) == native
        yield lift(fn)(q, x), fn(q.dense(), rounded(x, others) if native else x)

    x, w = normal(*x_shape), normal(*w_shape)
    # Examples of different sizes, so that one scale for all would not do.
    x = x * jnp.arange(1.0, 1 + x_shape[batch]).reshape(
        [n if d == batch else 1 for d, n in enumerate(x_shape)]
    )
    close(jit(run)(x, w))


def test_a_convolution_with_groups_in_its_window_reads_rounded_activations(normal):
    fn, x_shape, w_shape, contract, batch = conv_fn("nhwc")
    q = quantize_array(normal(*w_shape), w8a8.grouped(4), contract)
    x = normal(*x_shape)
    others = tuple(d for d in range(x.ndim) if d != batch)
    expected = jax.jit(lambda q, x: fn(q.dense(), rounded(x, others)))(q, x)
    close([(jax.jit(lift(fn))(q, x), expected)])


def on_grid(x, grid, scale):
    return grid.nearest(x / scale) * scale


OTHERS = {
    "zero point": uint4,
    "powers": log4_sqrt2,
    "table": nf4.grouped(None),
    "floats": w8a8_fp8,
    "powers with integers": log4_sqrt2.with_activations("int8"),
    "zero point with integers": uint4.with_activations("int4"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_format_multiplies_as_its_dense_weight(name, normal):
    fmt = OTHERS[name]
    fn, x_shape, w_shape, contract, batch = conv_fn("nhwc")
    others = tuple(d for d in range(len(x_shape)) if d != batch)

    def near(x, shared):
        if fmt.activations is None:
            return x
        grid = named(fmt.activations)
        return on_grid(x, grid, jnp.abs(x).max(shared, keepdims=True) / grid.largest)

    def run(x, w, images, kernel):
        for weight_first in (False, True):
            dot = dot_fn("two batch", weight_first)
            q = quantize_array(w, fmt, (2,), (1, 3))
            assert is_native(dot, q, x)
            yield lift(dot)(q, x), dot(q.dense(), near(x, (3,)))
        q = quantize_array(kernel, fmt, contract)
        assert is_native(fn, q, images)
        yield lift(fn)(q, images), fn(q.dense(), near(images, others))

    shapes = (*DOTS["two batch"][:2], x_shape, w_shape)
    close(jit(run)(*(normal(*s) for s in shapes)))


@pytest.mark.parametrize("fmt", [w8a8, w8a8_fp8], ids=lambda f: f.name)
def test_a_scale_known_beforehand_clips_what_lies_beyond_it(fmt, normal):
    grid = named(fmt.activations)
    dot = dot_fn("two batch", False)
    fn, x_shape, w_shape, contract, _ = conv_fn("nhwc")

    def run(x, w, images, kernel):
        # Along the batch dims of the weight it may vary: a scan or vmap slices it.
        q = quantize_array(w, fmt, (2,), (1, 3))
        x_scale = (1 + jnp.arange(6.0)).reshape(1, 3, 1, 2) / grid.largest
        q = dataclasses.replace(q, x_scale=x_scale)
        scale = x_scale[0, :, 0, :].T[:, None, :, None]  # x has dims 1 and 3 as 2, 0
        yield lift(dot)(q, x), dot(q.dense(), on_grid(x, grid, scale))
        q = quantize_array(kernel, fmt, contract)
        scale = jnp.full((1, 1, 1, 1), 0.5 / grid.largest)
        q = dataclasses.replace(q, x_scale=scale)
        yield lift(fn)(q, images), fn(q.dense(), on_grid(images, grid, scale))

    shapes = (*DOTS["two batch"][:2], x_shape, w_shape)
    close(jit(run)(*(normal(*s) for s in shapes)))


@pytest.mark.parametrize("fn, shapes, primitive", [
    (lambda w, x: x @ w, [(5, 8), (8, 6)], "dot_general"),
    (conv_fn("depthwise")[0], conv_fn("depthwise")[1:3], "conv_general_dilated"),
])  # fmt: skip
def test_the_integer_product_is_one_of_int8_summed_in_int32(
    fn, shapes, primitive, normal
):
    x, w = (normal(*s) for s in shapes)
    contract = range(w.ndim - 1)
    q = quantize_array(w, w8a8, tuple(contract))
    jaxpr = jax.make_jaxpr(lift(fn))(q, x)
    (eqn,) = (e for _, e, _ in equations(jaxpr) if e.primitive.name == primitive)
    assert [v.aval.dtype.name for v in eqn.invars] == ["int8", "int8"]
    assert eqn.outvars[0].aval.dtype == jnp.int32


def test_what_is_not_finite_comes_out_as_nan_where_it_went_in(normal):
    fn, x_shape, w_shape, contract, _ = conv_fn("nhwc")
    x, images = np.array(normal(3, 8)), np.array(normal(*x_shape))
    w, kernel = normal(8, 6), normal(*w_shape)

    @jax.jit
    def run(x, images):
        q = quantize_array(w, w8a8, (0,)), quantize_array(kernel, w8a8, contract)
        return lift(jnp.dot)(x, q[0]), lift(fn)(q[1], images)

    for bad in (np.inf, -np.inf, np.nan):
        x[1, 4] = images[1, 0, 0, 0] = bad
        y, convolved = run(x, images)
        np.testing.assert_array_equal(np.isnan(y).all(1), [False, True, False])
        np.testing.assert_array_equal(np.isnan(y).any(1), [False, True, False])
        assert np.isnan(convolved[1]).all() and np.isfinite(convolved[0]).all()


def test_rows_of_zeros_give_zeros(normal):
    w = quantize_array(normal(8, 6), w8a8, (0,))
    np.testing.assert_array_equal(lift(jnp.dot)(jnp.zeros((3, 8)), w), np.zeros((3, 6)))


@pytest.mark.parametrize("kind", ["dot", "grouped", "conv"])
def test_the_gradient_is_straight_through(kind, normal):
    fn, x_shape, w_shape, contract = lambda w, x: x @ w, (5, 8), (8, 6), (0,)
    if kind == "conv":
        fn, x_shape, w_shape, contract, _ = conv_fn("nhwc")
    fmt = w8a8.grouped(2) if kind == "grouped" else w8a8
    x, tangent, w = normal(*x_shape), normal(*x_shape), normal(*w_shape)
    g = normal(*jax.eval_shape(fn, w, x).shape)

    def derivatives(run, q):
        with_scale = lambda x, s: run(dataclasses.replace(q, scale=s), x)
        return (
            jax.jvp(lambda x: run(q, x), [x], [tangent])[1],
            *jax.vjp(with_scale, x, q.scale)[1](g),
        )

    @jit
    def run(w):
        q = quantize_array(w, fmt, contract)
        dense = lambda q, x: fn(q.dense(), x)
        yield from zip(derivatives(lift(fn), q), derivatives(dense, q), strict=True)

    for ours, expected in run(w):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", [int8, int4.grouped(2)], ids=lambda f: f.name)
def test_the_gradient_of_a_product_with_the_integers_is_the_dense_one(fmt, normal):
    x, w, g = normal(5, 8), normal(8, 6), normal(5, 6)

    @jit
    def run(w):
        q = quantize_array(w, fmt, (0,))
        for fn in (lift(jnp.dot), lambda x, q: x @ q.dense()):
            loss = lambda x, s, fn=fn: (
                fn(x, dataclasses.replace(q, scale=s)) * g
            ).sum()
            yield jax.grad(loss, (0, 1))(x, q.scale)

    for ours, expected in zip(*run(w), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_derivative_in_the_activations_multiplies_nothing_for_the_scale(normal):
    q = quantize_array(normal(64, 48), w8a8, (0,))
    run = jax.jit(jax.value_and_grad(lambda x: (lift(jnp.dot)(x, q) ** 2).sum()))
    compiled = run.lower(normal(32, 64)).compile().as_text()
    # The integers forward; the cotangent times the dense weight; nothing with x.
    assert compiled.count(" dot(") == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_activations_keep_their_dtype_and_do_not_overflow(dtype, normal):
    # Weights so small that x times the bare integers is beyond float16.
    w = (normal(512, 6) * 1e-3).astype(dtype)
    x = (75 + 8 * normal(5, 512)).astype(dtype)
    fn = lambda w, x: x @ w

    @jit
    def run(w, x):
        for fmt in (int8, int4, w8a8):
            q = quantize_array(w, fmt, (0,))
            exact = x.astype(jnp.float32) @ q.astype(jnp.float32).dense()
            gradient = jax.grad(lambda x, q=q: lift(fn)(q, x).sum())(x)
            yield lift(fn)(q, x), exact, gradient

    for y, exact, gradient in run(w, x):
        assert y.dtype == gradient.dtype == dtype
        error = jnp.abs(y.astype(jnp.float32) - exact).max()
        assert error <= 0.02 * jnp.abs(exact).max()


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_too_long_for_32_bits_are_floating_ones(groups):
    longest = longest_sum(Linear(8), Linear(8))
    assert (longest + 1) * 127**2 > 2**31 - 1 >= longest * 127**2
    for length, dtype in ((longest, jnp.int32), (longest + 1, jnp.float32)):
        fmt = w8a8 if groups == 1 else w8a8.grouped(length)
        n = groups * length
        x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, n), (n, 1)))
        q = jax.eval_shape(lambda w, f=fmt: quantize_array(w, f, (0,)), w)
        jaxpr = jax.make_jaxpr(lift(lambda w, x: x @ w))(q, x)
        found = (e for _, e, _ in equations(jaxpr))
        (dot,) = (e for e in found if e.primitive.name == "dot_general")
        assert dot.outvars[0].aval.dtype == dtype


def test_products_with_what_is_no_16_bit_float_run_dense(normal):
    q = quantize_array(normal(8, 6), w8a8, (0,))
    x = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    fn = lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ())))
    assert [e.native for e in lift_report(fn, q, x)] == [False]
    np.testing.assert_allclose(lift(fn)(q, x), fn(q.dense(), x), rtol=1e-6)
