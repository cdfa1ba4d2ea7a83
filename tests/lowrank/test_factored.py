import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxeff import tree
from jaxeff.lowrank import Factored
from jaxeff.program import lift, lift_report


def make(normal, batch, rows, cols, rank=3):
    u, v = normal(*batch, *rows, rank), normal(*batch, rank, *cols)
    return Factored(u, v, len(cols))


def jit(generator):
    """Compiles a generator as the function that returns the list of its values."""
    return jax.jit(lambda *args: list(generator(*args)))


def close(pairs):
    for ours, expected in pairs:
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def is_native(fn, *args):
    return [e.native for e in lift_report(fn, *args)] == [True]


SPLITS = [((), (8,), (6,)), ((), (2, 4), (3, 2)), ((5,), (8,), (6, 2))]


def test_flattening_and_back_keeps_every_field(normal):
    w = Factored(normal(4, 5, 3), normal(4, 3, 6, 2), 2)
    leaves, treedef = jax.tree.flatten(w)
    again = jax.tree.unflatten(treedef, leaves)
    for field in dataclasses.fields(Factored):
        assert getattr(again, field.name) is getattr(w, field.name)
    assert jax.tree.structure(dataclasses.replace(w, cols=1)) != treedef
    assert list(tree.paths({"w": w})) == ["w/u", "w/v"]


@pytest.mark.parametrize("batch, rows, cols", SPLITS)
def test_dense_is_the_product_of_the_factors(batch, rows, cols, normal):
    w = make(normal, batch, rows, cols)
    assert w.shape == batch + rows + cols
    assert (w.batch, w.rows, w.cols, w.rank) == (len(batch), len(rows), len(cols), 3)
    u = np.asarray(w.u).reshape(-1, np.prod(rows), 3)
    v = np.asarray(w.v).reshape(-1, 3, np.prod(cols))
    np.testing.assert_allclose(w.dense(), (u @ v).reshape(w.shape), rtol=1e-4)


def test_views_have_the_same_numbers_as_views_of_dense(normal):
    plain = make(normal, (), (2, 4), (3, 5))
    stacked = make(normal, (2,), (4, 3), (5,))
    views = [
        (plain, lambda x: x.transpose((0, 1, 2, 3))),
        (plain, lambda x: x.transpose((1, 0, 3, 2))),
        (plain, lambda x: x.transpose((3, 2, 0, 1))),
        (plain, lambda x: x.reshape((8, 15))),
        (plain, lambda x: x.reshape((2, 2, 2, 1, 15))),
        (plain, lambda x: x.reshape((1, 8, 3, 5, 1))),
        (plain, lambda x: x.transpose((2, 3, 0, 1)).reshape((15, 8))),
        (stacked, lambda x: x.transpose((0, 3, 2, 1))),
        (stacked, lambda x: x.reshape((2, 12, 5))),
    ]
    for w, view in views:
        assert isinstance(view(w), Factored)
    close(jit(lambda: ((view(w).dense(), view(w.dense())) for w, view in views))())
    for leaf in (
        plain.transpose((0, 2, 1, 3)),  # rows and columns would mix
        plain.reshape((24, 5)),
        plain.reshape((120,)),
        stacked.transpose((1, 0, 2, 3)),
        stacked.reshape((24, 5)),
        plain.astype(jnp.int32),
    ):
        assert leaf is NotImplemented
    half = plain.astype(jnp.bfloat16)
    assert half.dtype == half.dense().dtype == jnp.bfloat16


@pytest.mark.parametrize("batch, rows, cols", SPLITS)
def test_indices_are_dropped_from_the_factor_that_has_them(batch, rows, cols, normal):
    w = make(normal, batch, rows, cols)
    for dim, n in enumerate(w.shape):
        mask = np.arange(n) % 3 != 1
        small = w.keep(dim, mask)
        assert isinstance(small, Factored) and small.rank == w.rank
        dense = np.compress(mask, np.asarray(w.dense()), axis=dim)
        np.testing.assert_allclose(small.dense(), dense, rtol=1e-5, atol=1e-6)


# (split of the weight, shape of x, contracting dims, batch dims) of x and w.
DOTS = {
    "rows": (((), (8,), (6,)), (5, 8), ((1,), (0,)), ((), ())),
    "columns": (((), (8,), (6,)), (5, 6), ((1,), (1,)), ((), ())),
    "vector": (((), (8,), (6,)), (8,), ((0,), (0,)), ((), ())),
    "several": (((), (2, 4), (3, 2)), (4, 5, 2), ((0, 2), (1, 0)), ((), ())),
    "several columns": (((), (2, 4), (3, 2)), (2, 5, 3), ((0, 2), (3, 2)), ((), ())),
    "some of the rows": (((), (2, 4), (3, 2)), (5, 4), ((1,), (1,)), ((), ())),
    "some of both": (((), (2, 4), (3, 2)), (5, 4, 2), ((1, 2), (1, 3)), ((), ())),
    "all": (((), (2, 4), (3,)), (2, 4, 3), ((0, 1, 2), (0, 1, 2)), ((), ())),
    "batch": (((5,), (8,), (6,)), (7, 5, 8), ((2,), (1,)), ((1,), (0,))),
    "batch of rows": (((), (5, 8), (6,)), (7, 5, 8), ((2,), (1,)), ((1,), (0,))),
    "batch of columns": (((), (8,), (5, 6)), (7, 5, 8), ((2,), (0,)), ((1,), (1,))),
    "free batch": (((5,), (8,), (6,)), (7, 8), ((1,), (1,)), ((), ())),
    "summed batch": (((5,), (8,), (6,)), (5, 7, 8), ((0, 2), (0, 1)), ((), ())),
}


@pytest.mark.parametrize("name", DOTS)
def test_two_products_are_the_product_with_dense(name, normal):
    split, x_shape, (xc, wc), (xb, wb) = DOTS[name]

    def weight_first(w, x):
        return lax.dot_general(w, x, ((wc, xc), (wb, xb)))

    def weight_second(w, x):
        return lax.dot_general(x, w, ((xc, wc), (xb, wb)))

    def run(w, x):
        for fn in (weight_first, weight_second):
            assert is_native(fn, w, x)
            yield lift(fn)(w, x), fn(w.dense(), x)

    close(jit(run)(make(normal, *split), normal(*x_shape)))


def test_low_rank_costs_less_than_dense(normal):
    w, x = make(normal, (), (64,), (48,), rank=4), normal(8, 64)
    flops = lambda fn, w: jax.jit(fn).lower(w, x).compile().cost_analysis()["flops"]
    fn = lambda w, x: x @ w
    assert flops(lift(fn), w) == 2 * 8 * 4 * (64 + 48)
    assert flops(fn, w.dense()) == 2 * 8 * 64 * 48


CONVS = {
    "hwio": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 4), ((3, 3, 4), (6,))),
    "1x1": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 4), ((1, 1, 4), (6,))),
    "oihw": (("NCHW", "OIHW", "NCHW"), (2, 4, 6, 5), ((6,), (4, 3, 2))),
    "mixed": (("NHWC", "OIHW", "NCHW"), (2, 6, 5, 4), ((6,), (4, 3, 3))),
    "one dim": (("NWC", "WIO", "CNW"), (2, 9, 4), ((3, 4), (6,))),
}


@pytest.mark.parametrize("name", CONVS)
def test_two_convolutions_are_the_convolution_with_dense(name, normal):
    numbers, x_shape, split = CONVS[name]
    space = len(x_shape) - 2

    def run(w, x):
        for stride, dilation in ((1, 1), (2, 1), (1, 2)):
            fn = lambda w, x, s=stride, d=dilation: lax.conv_general_dilated(
                x,
                w,
                [s] * space,
                [(1, 2)] * space,
                rhs_dilation=[d] * space,
                dimension_numbers=numbers,
            )
            assert is_native(fn, w, x)
            yield lift(fn)(w, x), fn(w.dense(), x)

    close(jit(run)(make(normal, (), *split), normal(*x_shape)))


@pytest.mark.parametrize("groups", ["feature_group_count", "batch_group_count"])
def test_grouped_convolutions_run_dense(groups, normal):
    fn = lambda w, x: lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **{groups: 2},
    )
    x = normal(2, 6, 5, 8 if groups.startswith("feature") else 4)
    w = make(normal, (), (3, 3, 4), (6,))
    assert not is_native(fn, w, x)
    close([(lift(fn)(w, x), fn(w.dense(), x))])


LOOKUPS = {
    "rows": (((), (7,), (6,)), 0, (2, 3)),
    "columns": (((), (6,), (7,)), 1, (4,)),
    "of several rows": (((), (2, 7), (4, 3)), 1, (2, 3)),
    "of several columns": (((), (2, 4), (3, 7)), 3, (4,)),
    "of a batch": (((5,), (7,), (6, 2)), 1, (4,)),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_look_up_finds_the_rows_of_dense(name, normal):
    split, dim, at = LOOKUPS[name]
    index = np.random.default_rng(0).integers(0, 7, at)
    index.flat[0] = 7  # out of bounds: NaN

    def run(w):
        for mode in ("fill", "clip"):
            fn = lambda w, mode=mode: jnp.take(w, index, axis=dim, mode=mode)
            assert is_native(fn, w)
            yield lift(fn)(w), fn(w.dense())

    close(jit(run)(make(normal, *split)))


def test_a_look_up_does_not_build_the_table(normal):
    w = make(normal, (), (64,), (16,), rank=2)
    take = lift(lambda w, i: jnp.take(w, i, axis=0))
    jaxpr = jax.make_jaxpr(take)(w, jnp.array([3, 5]))
    assert "64,16" not in str(jaxpr)


def test_slices_along_a_leading_dim_are_the_slices_of_dense(normal):
    w, x = make(normal, (3,), (8,), (6,)), normal(5, 8)
    one = lambda w: lift(lambda w, x: x @ w)(w, x)

    @jax.jit
    def run(w):
        _, scanned = lax.scan(lambda c, w: (c, jax.checkpoint(one)(w)), None, w)
        return jax.vmap(one)(w), scanned, jax.vmap(lambda w: w.dense())(w)

    vmapped, scanned, dense = run(w)
    np.testing.assert_allclose(dense, w.dense(), rtol=1e-5, atol=1e-5)
    for ours in (vmapped, scanned):
        np.testing.assert_allclose(ours, x @ w.dense(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_factors_is_that_of_their_product(normal):
    w, x = make(normal, (), (8,), (6,)), normal(5, 8)
    fn = lambda w, x: jnp.sin(x @ w).sum()
    train, frozen = tree.partition({"w": w})
    assert not jax.tree.leaves(frozen)
    ours = jax.grad(lambda t: lift(fn)(t["w"], x))(train)["w"]
    expected = jax.grad(lambda w: fn(w.dense(), x))(w)
    close(zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True))


def test_narrow_activations_keep_their_dtype(normal):
    w, x = make(normal, (), (8,), (6,)).astype(jnp.bfloat16), normal(5, 8)
    y = lift(jnp.dot)(x.astype(jnp.bfloat16), w)
    assert y.dtype == jnp.bfloat16
    exact = x @ w.astype(jnp.float32).dense()
    assert jnp.abs(y.astype(jnp.float32) - exact).max() < 0.03 * jnp.abs(exact).max()
