import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.program import lift, lift_report
from jaxeff.quantization import (
    bfloat16,
    blocks,
    int3,
    int4,
    int8,
    log4_sqrt2,
    mxfp4,
    mxfp6,
    nf4,
    nvfp4,
    QArray,
    quantize_array,
    uint4,
    w8a8,
)

# Eager JAX would compile each operation for each shape.
run_fit = jax.jit(quantize_array, static_argnums=(1, 2), static_argnames="fit")
quantize_array = jax.jit(quantize_array, static_argnums=(1, 2, 3))
# Of this module, what takes longer than 5 s.
SLOW = {
    "test_every_view_has_the_same_numbers[int3 rows of 4]",
    "test_every_view_has_the_same_numbers[e2m3 groups of 4, e8m0 scales]",
}

ROWS = dataclasses.replace(int3.grouped(4), outputs=None)
FORMATS = [
    int8,
    int4,
    int8.grouped(4),
    int4.grouped(4),
    w8a8,
    ROWS,
    uint4.grouped(4),
    log4_sqrt2.per_tensor(),
    mxfp6.grouped(4),
    nvfp4.grouped(4),
    nf4.grouped(4),
    bfloat16,
]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def spread(x, shape):
    """`x` with each entry repeated over its block."""
    x = np.asarray(x).astype(np.float32)
    for d, (n, m) in enumerate(zip(shape, x.shape, strict=True)):
        x = np.repeat(x, n // m, axis=d)
    return x


def numpy_dense(q):
    """(number - zero) * scale * outer."""
    numbers = np.asarray(q.numbers.decode(q.codes())).astype(np.float32)
    if q.zero is not None:
        numbers = numbers - spread(q.zero, q.shape)
    scale = spread(q.scale, q.shape)
    return numbers * (scale if q.outer is None else scale * spread(q.outer, q.shape))


def test_flattening_and_back_keeps_every_field():
    q = QArray(
        values=jnp.ones((3, 2), jnp.uint8),
        scale=jnp.ones((1, 3)),
        outer=jnp.ones((1, 1)),
        zero=jnp.ones((1, 3), jnp.uint8),
        x_scale=jnp.ones((1, 1)),
        grid="uint4",
        dtype_name="bfloat16",
        activations="e4m3",
        packed=-1,
        length=3,
    )
    leaves, treedef = jax.tree.flatten(q)
    again = jax.tree.unflatten(treedef, leaves)
    others = {
        "grid": "uint2",
        "dtype_name": "float32",
        "activations": None,
        "packed": None,
        "length": 4,
    }
    for field in dataclasses.fields(QArray):
        assert getattr(again, field.name) is getattr(q, field.name)
        if field.metadata.get("static"):
            changed = dataclasses.replace(q, **{field.name: others.pop(field.name)})
            assert jax.tree.structure(changed) != treedef
    assert not others
    assert list(tree.paths({"w": q})) == [
        f"w/{n}" for n in ("values", "scale", "outer", "zero", "x_scale")
    ]


@by_name
def test_each_weight_becomes_the_nearest_number_times_its_scale(fmt, normal):
    w = normal(3, 8, 5) * jnp.asarray([1e-6, 1, 1e6], jnp.float32)[:, None, None]
    w = w.at[1, :, 2].set(0)
    q = quantize_array(w, fmt, (1,), (0,))
    assert (q.shape, q.dtype) == (w.shape, w.dtype)
    np.testing.assert_allclose(q.dense(), numpy_dense(q), rtol=1e-6)
    scale = spread(q.scale, w.shape)
    scale = scale if q.outer is None else scale * spread(q.outer, w.shape)
    zero = 0 if q.zero is None else spread(q.zero, w.shape)
    if fmt is not bfloat16:  # it has too many levels for this
        levels = np.asarray(q.numbers.levels)
        exact = np.asarray(w, np.float64) / scale + zero
        nearest = np.abs(exact[..., None] - levels).min(-1)
        off = np.abs(np.asarray(q.dense(), np.float64) - w) / scale
        np.testing.assert_allclose(off, nearest, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(q.dense()[1, :, 2], 0)


INTEGERS = [int8, int4, int4.grouped(4), int3.tiled(4, 5), uint4.grouped(4)]


@pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)
def test_integers_are_off_by_at_most_half_a_step(fmt, normal):
    w = normal(3, 8, 5) * jnp.asarray([1e-6, 1, 1e6], jnp.float32)[:, None, None]
    q = quantize_array(w, fmt, (1,), (0,))
    assert np.all(np.abs(q.dense() - w) <= 0.5001 * spread(q.scale, w.shape))
    if fmt.grid.symmetric:
        assert np.abs(q.codes()).max() == 2 ** (fmt.bits - 1) - 1
    else:
        assert (int(q.codes().min()), int(q.codes().max())) == (0, 15)


@by_name
def test_a_scale_of_least_error_is_never_worse(fmt, normal):
    w = normal(8, 10)
    importance = jnp.arange(1.0, 9)[:, None]
    error = lambda q: blocks.total(
        importance * (q.dense() - w) ** 2, fmt.blocks(w.shape, (0,))
    )
    plain = quantize_array(w, fmt, (0,))
    best = run_fit(w, fmt, (0,), fit="mse", importance=importance)
    assert jax.tree.structure(best) == jax.tree.structure(plain)
    assert jnp.all(error(best) <= error(plain) * (1 + 1e-6))
    if fmt in (int4, log4_sqrt2.per_tensor()):
        assert error(best).sum() < 0.95 * error(plain).sum()


def test_blocks_of_powers_of_two_follow_the_specification(normal):
    w = 100 * normal(64, 4)
    q = quantize_array(w, mxfp4, (0,))
    largest = np.abs(np.asarray(w)).reshape(2, 32, 4).max(1)
    # OCP MX 1.0, section 6.3: the exponent of the largest, less that of the format.
    expected = 2.0 ** (np.floor(np.log2(largest)) - 2)
    np.testing.assert_array_equal(q.scale.astype(jnp.float32), expected)


def test_a_zero_point_makes_zero_exact_and_spends_no_step_beyond_the_range(normal):
    w = jnp.abs(normal(16, 4)).at[3].set(0)
    q = quantize_array(w, uint4, (0,))
    np.testing.assert_array_equal(q.dense()[3], 0)
    np.testing.assert_allclose(q.scale, w.max(0, keepdims=True) / 15, rtol=1e-6)


def test_ties_go_to_the_even_integer_and_the_range_is_symmetric():
    w = jnp.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]]).T
    q = quantize_array(w, int8, (0,))
    np.testing.assert_array_equal(q.values[:, 0], [127, 0, 2, 2, 0, -2, -127])
    np.testing.assert_array_equal(quantize_array(-w, int8, (0,)).values, -q.values)


def test_what_is_on_the_grid_is_not_changed():
    w = jnp.arange(-7.0, 8)[:, None] * jnp.array([[0.25, 3]])
    dense = quantize_array(w, int4, (0,)).dense()
    np.testing.assert_allclose(dense, w, rtol=3e-7)  # XLA divides by 7 to one ulp


@by_name
@pytest.mark.parametrize("fit", ["absmax", "mse"])
def test_a_channel_that_is_not_finite_becomes_nan(fmt, fit):
    w = jnp.ones((4, 5)).at[1, 1].set(jnp.inf).at[2, 4].set(jnp.nan)
    dense = run_fit(w, fmt, (0,), fit=fit).dense()
    assert np.isnan(dense)[:, [1, 4]].all()
    alone = fmt.outputs == 1 and fmt.scale == "float32"
    assert not alone or np.isfinite(dense[:, [0, 2, 3]]).all()


@pytest.mark.parametrize(
    "shape, contract, batch",
    [((6, 8), (0,), ()), ((3, 3, 1, 16), (0, 1, 2), ()), ((4, 3, 6), (1,), (0, 1))],
)
def test_a_4_bit_weight_takes_half_a_byte(shape, contract, batch, normal):
    q = quantize_array(normal(*shape), int4, contract, batch)
    assert q.values.dtype == jnp.uint8
    scales = np.prod([1 if d in contract else n for d, n in enumerate(shape)])
    assert tree.tree_bytes(q) == np.prod(shape) // 2 + 4 * scales


def test_the_dim_that_wastes_least_is_packed(normal):
    q = quantize_array(normal(3, 7, 5), int4, (1,))
    assert (q.packed, q.length, q.values.shape) == (-2, 7, (3, 4, 5))
    np.testing.assert_array_equal(q.dense(), numpy_dense(q))
    q = quantize_array(normal(16, 7, 12), int3, (1,))  # eight to three bytes
    assert (q.packed, q.values.shape) == (-3, (6, 7, 12))


def test_bytes_never_hold_two_indices_of_a_sliced_dim(normal):
    assert quantize_array(normal(4, 6, 3), int4, (1,), (0,)).packed == -2
    assert quantize_array(normal(3, 6, 4), int4, (1,), (1, 2)).packed == -3
    with pytest.raises(ValueError, match="all dims of shape .4, 6. are sliced"):
        quantize_array(normal(4, 6), int4, (), (0, 1))


@by_name
def test_every_view_has_the_same_numbers(fmt, normal):
    w = normal(2, 8, 3, 4)
    q = quantize_array(w, fmt, (1,), (0,))
    mask = {d: np.arange(n) % 3 != 1 for d, n in enumerate(w.shape)}
    views = {
        "transpose": lambda x: x.transpose((2, 1, 3, 0)),
        "merge": lambda x: x.reshape((2, 8, 12)),
        "split": lambda x: x.reshape((2, 4, 2, 3, 4)),
        "regroup": lambda x: x.reshape((16, 12)),
        "odd": lambda x: x.reshape((6, 2, 16)),
        "expand": lambda x: x.reshape((2, 1, 8, 3, 4, 1)),
        "both": lambda x: x.transpose((3, 0, 2, 1)).reshape((8, 24)),
    }
    for d, m in mask.items():
        views[f"keep {d}"] = lambda x, d=d, m=m: (
            x.keep(d, m) if isinstance(x, QArray) else np.compress(m, x, axis=d)
        )

    leaves = {k: v(q) for k, v in views.items()}
    dense = jax.jit(lambda ls: {k: v.dense() for k, v in ls.items()})(leaves)
    for name, view in views.items():
        assert leaves[name].shape == dense[name].shape
        np.testing.assert_array_equal(dense[name], view(np.asarray(q.dense())), name)


def test_keeping_indices_keeps_the_storage(normal):
    q = quantize_array(normal(8, 6), int4.grouped(4), (0,))
    small = q.keep(1, np.arange(6) < 5).keep(0, np.arange(8) % 2 == 0)
    assert small.values.dtype == jnp.uint8 and small.packed == q.packed
    assert small.scale.shape == (2, 5)  # groups of 4 became groups of 2


def test_a_cast_changes_the_dtype_of_what_it_stands_for(normal):
    q = quantize_array(normal(8, 6), int8, (0,))
    half = q.astype(jnp.bfloat16)
    assert half.dtype == half.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.dense(), q.dense().astype(jnp.bfloat16))
    assert q.astype(jnp.int32) is NotImplemented


@by_name
def test_slices_along_a_leading_dim_are_the_slices_of_dense(fmt, normal):
    w, x = normal(3, 8, 6), normal(5, 8)
    q = quantize_array(w, fmt, (1,), (0,))

    @jax.jit
    def run(q):
        one = lambda x, q: lift(lambda w, x: x @ w)(q, x)
        vmapped = jax.vmap(one, (None, 0))(x, q)
        _, scanned = jax.lax.scan(lambda c, q: (c, one(x, q)), None, q)
        slices = [jax.tree.map(lambda a, i=i: a[i], q) for i in range(3)]
        sliced = jnp.stack([one(x, q) for q in slices])
        return vmapped, scanned, sliced, jax.vmap(lambda q: q.dense())(q), q.dense()

    vmapped, scanned, sliced, dense, whole = run(q)
    np.testing.assert_array_equal(dense, whole)
    np.testing.assert_allclose(vmapped, sliced, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scanned, sliced, rtol=1e-5, atol=1e-5)
    if fmt.activations is None:
        np.testing.assert_allclose(sliced, x @ whole, rtol=1e-4, atol=1e-5)


LOOKUPS = {
    "rows": ((7, 8), 0, (4, 3)),
    "columns": ((8, 7), 1, (4,)),
    "middle": ((4, 7, 6), 1, (2, 3)),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_look_up_finds_the_rows_of_dense(name, normal):
    shape, dim, at = LOOKUPS[name]
    others = [d for d in range(len(shape)) if d != dim]
    w = normal(*shape)
    # One index is out of bounds: by default that row is NaN.
    index = np.random.default_rng(0).integers(0, shape[dim] + 1, at)
    index.flat[0] = shape[dim]
    fns = [
        lambda w: jnp.take(w, index, axis=dim),
        lambda w: jnp.take(w, index, axis=dim, mode="clip"),
        lambda w: jnp.take(w, index, axis=dim, fill_value=0),
        lambda w: jnp.moveaxis(w, dim, 0)[jnp.asarray(index)],
    ]

    @jax.jit
    def run(w):
        out = []
        for fmt in (int8, int4, int4.grouped(2), uint4.grouped(2)):
            for contract, batch in ((others[-1:], [dim]), ([dim], others[:-1])):
                if fmt.group and shape[contract[-1]] % fmt.group:
                    continue
                q = quantize_array(w, fmt, tuple(contract), tuple(batch))
                for fn in fns:
                    assert [e.native for e in lift_report(fn, q)] == [True]
                    out.append((lift(fn)(q), fn(q.dense())))
        return out

    for ours, expected in run(w):
        np.testing.assert_array_equal(ours, expected)


def test_a_look_up_does_not_decode_the_table(normal):
    q = quantize_array(normal(64, 8), int4.grouped(4), (1,), (0,))
    take = lift(lambda w, i: jnp.take(w, i, axis=0))
    jaxpr = jax.make_jaxpr(take)(q, jnp.array([3, 5]))
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) < 64 * 8 / 2


def test_only_the_scale_trains_and_integers_never_reach_grad(normal):
    params = {"w": quantize_array(normal(8, 6), int4, (0,)), "b": normal(6)}
    train, frozen = tree.partition(params)
    floats = [x.dtype for x in jax.tree.leaves(train)]
    assert floats == [jnp.float32] * 2 and train["w"].values is None
    fn = lift(lambda p, x: x @ p["w"] + p["b"][None])
    loss = lambda t, x: (fn(tree.combine(t, frozen), x) ** 2).sum()
    grads, gx = jax.jit(jax.grad(loss, (0, 1)))(train, normal(5, 8))
    assert grads["w"].scale.shape == (1, 6) and gx.shape == (5, 8)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((grads, gx)))


def test_shapes_alone_are_enough():
    w = jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    q = jax.eval_shape(lambda w: quantize_array(w, int4.grouped(16), (0,)), w)
    assert (q.shape, q.dtype, q.scale.shape) == ((64, 48), jnp.bfloat16, (4, 48))
