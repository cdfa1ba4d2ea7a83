import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxeff import lift, lift_report, tree
from jaxeff.program import dense, dense_size, is_leaf, shapes, unlift
from tests.program.built import build, some, zoo
from tests.program.leaves import compress, Scaled, Shy


def hlo(fn, *args):
    """What is compiled, without the name of the function."""
    text = jax.jit(fn).lower(*args).as_text()
    return re.sub(r"^module @\S+", "module @fn", text)


# Nothing compressed.


@zoo
def test_without_leaves_it_compiles_to_the_same_program(case):
    model = build(case)
    operands = model.params, *model.args
    assert hlo(lift(model.fn), *operands) == hlo(model.fn, *operands)


def quadratic(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


X = jr.normal(jr.key(0), (4, 6))
PARAMS = {"w": jr.normal(jr.key(1), (6, 5)), "v": jr.normal(jr.key(2), (5, 6))}

AROUND = {
    "grad": lambda fn: jax.grad(lambda p, x: fn(p, x).sum()),
    "vmap": lambda fn: jax.vmap(fn, (None, 0)),
    "remat": lambda fn: jax.grad(lambda p, x: jax.checkpoint(fn)(p, x).sum()),
    "scan": lambda fn: lambda p, x: lax.scan(lambda y, _: (fn(p, y), y), x, length=3),
}


@pytest.mark.parametrize("name", AROUND)
def test_without_leaves_it_is_the_function_under_every_transformation(name):
    around = AROUND[name]
    assert hlo(around(lift(quadratic)), PARAMS, X) == hlo(around(quadratic), PARAMS, X)


def test_lifting_twice_is_lifting_once():
    fn = lift(quadratic)
    assert lift(fn) is fn and unlift(fn) is quadratic and unlift(quadratic) is quadratic
    assert lift(quadratic) == fn and hash(lift(quadratic)) == hash(fn)


# Everything compressed.


def close(a, b, tolerance=1e-5):
    scale = max(float(jnp.abs(b).max()), 1e-3)
    return float(jnp.abs(a - b).max()) <= tolerance * scale


@zoo
def test_with_leaves_it_equals_the_function_of_the_dense_weights(case):
    model = build(case)
    leaves = compress(model.params)
    got = jax.jit(lift(model.fn))(leaves, *model.args)
    want = model.jitted(dense(leaves), *model.args)
    assert got.dtype == want.dtype and close(got, want)


@some("linen_cnn", "plain_transformer", "nnx_transformer", "plain_custom_vjp")
def test_with_leaves_that_do_nothing_it_keeps_every_bit(case):
    model = build(case)
    got = jax.jit(lift(model.fn))(compress(model.params, Shy), *model.args)
    assert jnp.array_equal(got, model.jitted(model.params, *model.args))


@zoo
def test_kernels_and_tables_run_natively_and_the_rest_is_said_to_be_dense(case):
    model = build(case)
    leaves = compress(model.params)
    compressed = {p for p, x in tree.paths(leaves, is_leaf).items() if is_leaf(x)}
    report = lift_report(model.fn, leaves, *model.args)
    native = {entry.path for entry in report if entry.native}
    # However deep in scans and rematerialised bodies.
    assert native == {site.path for site in model.program.sites} & compressed
    shy = lift_report(model.fn, compress(model.params, Shy), *model.args)
    assert {e.path for e in shy} == {e.path for e in report} <= compressed
    assert not any(entry.native for entry in shy)


def test_the_report_names_weight_operation_and_line():
    def fn(params, x):
        return x @ params["w"] + jnp.cos(params["b"])

    leaves = {"w": Scaled(jnp.ones((6, 5))), "b": Scaled(jnp.ones((1, 5)))}
    a, b = sorted(lift_report(fn, leaves, X), key=lambda e: e.path)
    assert (b.path, b.primitive, b.native) == ("w", "dot_general", True)
    assert (a.path, a.primitive, a.native) == ("b", "cos", False)
    assert a.source.startswith("test_lift.py:") and a.source.endswith("(fn)")


def test_the_report_computes_nothing():
    leaves = {"w": Scaled(jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16))}
    x = jax.ShapeDtypeStruct((4, 10**6), jnp.bfloat16)
    (entry,) = lift_report(lambda p, x: x @ p["w"], leaves, x)
    assert entry.native


VIEWS = {
    "transpose": lambda w, x: x @ w.T,
    "reshape": lambda w, x: x @ w.reshape(6, 4),
    "squeeze": lambda w, x: x @ lax.squeeze(w.reshape(1, 4, 6), (0,)).T,
    "new dim": lambda w, x: jnp.einsum("bd,xdo->xbo", x, jnp.expand_dims(w.T, 0)),
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.T.astype(jnp.bfloat16),
    "weight first": lambda w, x: w @ x.T,
    "two dims": lambda w, x: jnp.einsum("bi,hki->bhk", x, w.reshape(2, 2, 6)),
    "batch dim": lambda w, x: jnp.einsum("bi,bi->b", x, w),
    "batched": lambda w, x: jnp.einsum("bi,bki->bk", x, w.reshape(4, 1, 6)),
    "stop gradient": lambda w, x: x @ lax.stop_gradient(w).T,
    "barrier": lambda w, x: x @ lax.optimization_barrier(w).T,
    "jit": lambda w, x: jax.jit(lambda w: x @ w.T)(w),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: x @ w.T)(w, x),
    "cond": lambda w, x: lax.cond(
        x[0, 0] > 0, lambda w: x @ w.T, lambda w: x @ w.T * 2, w
    ),
    "scan": lambda w, x: lax.scan(lambda c, w: (c, x @ w.T), None, w.reshape(2, 2, 6))[
        1
    ],
    "scan over a constant": lambda w, x: lax.scan(lambda c, x: (c, w @ x), None, x)[1],
    "while": lambda w, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, (s[1] @ w.T) @ w), (0, x)
    )[1],
    "slice": lambda w, x: x[:, 1:4] @ w[:2, 1:4].T,
    "strided slice": lambda w, x: x[:, ::2] @ w[1::2, ::2].T,
    "split": lambda w, x: [x @ v.T for v in jnp.split(w, [1])][1],
    "rows": lambda w, x: w[jnp.array([0, 2, -1])],
    "columns": lambda w, x: w[:, jnp.array([[0, 5], [1, 1]])],
    "rows of a view": lambda w, x: w.reshape(4, 2, 3)[jnp.array([3, 0])],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_leaf_stay_leaves(name):
    fn = VIEWS[name]
    leaf = Scaled(jr.normal(jr.key(4), (4, 6)), 0.25)
    assert close(lift(fn)(leaf, X), fn(leaf.dense(), X), 1e-5)
    if name != "while":  # its report is that of the site below
        assert {e.native for e in lift_report(fn, leaf, X)} == {True}


DENSE = {
    "cos": lambda w, x: x @ jnp.cos(w).T,
    "nothing of it": lambda w, x: jnp.pad(x @ w[:0].T, ((0, 0), (0, 1))),
    "moving slice": lambda w, x: x @ lax.dynamic_slice(w, (x.argmin(), 0), (2, 6)).T,
    "added": lambda w, x: x + w,
    "reversed": lambda w, x: x @ w[::-1].T,
    "broadcast": lambda w, x: jnp.broadcast_to(w, (2, 4, 6)) * x[None],
    "one row": lambda w, x: w[1],
    "taken along": lambda w, x: jnp.take_along_axis(w, jnp.argsort(x, 1), 1),
    "convolved": lambda w, x: lax.conv(w[None, None], x[None, None], (1, 1), "SAME"),
    "carried": lambda w, x: lax.scan(lambda w, x: (w * 2, x), w, x)[0],
    "custom_vjp": lambda w, x: x @ jax.nn.relu(w).T,
    "sorted": lambda w, x: jnp.sort(w, 0),
    "sharded": lambda w, x: jax.shard_map(
        lambda w, x: x @ w.T,
        mesh=jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("a")),
        out_specs=P("a"),
    )(w, x),
}


@pytest.mark.parametrize("name", DENSE)
def test_any_other_operation_gets_the_dense_array(name):
    fn = DENSE[name]
    leaf = Scaled(jr.normal(jr.key(4), (4, 6)), 0.25)
    assert close(lift(fn)(leaf, X), fn(leaf.dense(), X))


def test_a_leaf_that_is_returned_is_dense():
    leaf = Scaled(jnp.ones((2, 3)))
    out = lift(lambda w: {"w": w, "t": w.T})(leaf)
    assert jnp.array_equal(out["w"], leaf.dense()) and out["t"].shape == (3, 2)


def test_leaves_may_stand_among_all_operands():
    fn = lambda params, x, w, *, v: (x @ params["w"]) @ w @ v
    leaf = lambda *shape: Scaled(jr.normal(jr.key(5), shape))
    operands = {"w": leaf(6, 5)}, X, leaf(5, 5)
    got = lift(fn)(*operands, v=leaf(5, 2))
    assert close(got, fn(*dense(operands), v=leaf(5, 2).dense()))


def test_two_leaves_that_meet():
    a, b = Scaled(jr.normal(jr.key(6), (4, 5))), Scaled(jr.normal(jr.key(7), (5, 3)))
    assert close(lift(lambda p: p[0] @ p[1])((a, b)), a.dense() @ b.dense())


def test_what_is_no_array_is_a_constant_as_for_the_function():
    def fn(params, x, flag, times=1):
        return (x @ params["w"]) * times if flag == "yes" else x

    leaves = {"w": Scaled(jnp.ones((6, 2))), "name": "text"}
    got = lift(fn)(leaves, X, "yes", times=3)
    assert close(got, fn(dense(leaves), X, "yes", times=3))


@pytest.mark.parametrize("name", AROUND)
def test_with_leaves_it_can_be_transformed(name):
    around = AROUND[name]
    x = jnp.stack([X, X + 1]) if name == "vmap" else X
    got = jax.jit(around(lift(quadratic)))(compress(PARAMS), x)
    want = jax.jit(around(lambda p, x: quadratic(dense(p), x)))(compress(PARAMS), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, want)


def test_gradients_reach_the_arrays_of_a_leaf():
    leaves = compress(PARAMS)
    grads = jax.grad(lambda p: lift(quadratic)(p, X).sum())(leaves)
    want = jax.grad(lambda p: quadratic(p, X).sum())(dense(leaves))
    assert isinstance(grads["w"], Scaled)
    # d/dvalues = factor * d/ddense
    assert close(grads["w"].values, 0.5 * want["w"])
    assert close(grads["v"].values, 0.5 * want["v"])


def test_leaves_are_batched_and_scanned_by_their_arrays():
    stacked = Scaled(jr.normal(jr.key(8), (3, 6, 6)))
    fn = lift(lambda w, x: jnp.tanh(x @ w))
    want = jnp.stack([jnp.tanh(X @ w) for w in stacked.dense()])
    assert close(jax.vmap(fn, (0, None))(stacked, X), want)
    assert close(lax.scan(lambda _, w: (None, fn(w, X)), None, stacked)[1], want)


def test_numpy_weights_of_double_precision_are_single_as_for_the_function():
    w = np.random.default_rng(0).normal(size=(6, 5))
    got = lift(quadratic)({"w": w, "v": Shy(PARAMS["v"])}, np.asarray(X, np.float64))
    assert jnp.array_equal(got, quadratic({"w": w, "v": PARAMS["v"]}, X))


def test_sizes_of_leaves_are_those_of_what_they_stand_for():
    leaves = {"w": Scaled(jnp.ones((6, 5))), "b": jnp.ones(5), "n": 3}
    assert dense_size(leaves) == 36
    assert shapes(leaves)["w"] == jax.ShapeDtypeStruct((6, 5), jnp.float32)
    assert (leaves["w"].ndim, leaves["w"].size) == (2, 30)
