"""Where XLA gets the gradient of a grouped convolution wrong, nobody trains with it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.parallelism import (
    batch_sharding,
    fully_shard,
    layer_parallel,
    make_mesh,
    one_f_one_b,
    pipeline,
    Pipelined,
    replicate,
    shard,
    Stages,
)
from jaxeff.quantization import bfloat16, quantize


def conv(x, w, groups):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def loss(params, x):
    x = jnp.tanh(conv(x, params["in"], 1))
    x = jnp.tanh(conv(x, params["deep"], 8))
    return (x.mean((1, 2)) @ params["out"]).var()


PARAMS = {
    "in": jr.normal(jr.key(0), (3, 3, 3, 8)),
    "deep": jr.normal(jr.key(1), (3, 3, 1, 8)),
    "out": jr.normal(jr.key(2), (8, 4)),
}
X = jr.normal(jr.key(3), (8, 6, 6, 3))


def wrong_by(fn, params, mesh):
    """How far the gradient of the grouped kernel is off, relative to itself."""
    grads = jax.jit(jax.grad(fn))(params, jax.device_put(X, batch_sharding(mesh, 8)))
    want = jax.grad(loss)(PARAMS, X)["deep"]
    return float(jnp.linalg.norm(grads["deep"] - want) / jnp.linalg.norm(want))


def test_it_is_wrong_on_copies():
    """If this fails, XLA was mended, and the check can go."""
    mesh = make_mesh(data=2, sequence=4)
    assert wrong_by(loss, replicate(PARAMS, mesh), mesh) > 0.5


WRONG = {
    "copies, nothing split": (shard, {"data": 2, "sequence": 4}, "copies along seq"),
    "the kernel split, copies": (
        shard,
        {"data": 2, "tensor": 2, "pipe": 2},
        "copies along pipe",
    ),
    "in parts": (fully_shard, {"fsdp": 2, "sequence": 4}, "copies along sequence"),
    "parts of one": (fully_shard, {"data": 2, "tensor": 4}, "copies along tensor"),
    "layers": (layer_parallel, {"pipe": 2, "data": 2, "tensor": 2}, "along tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_where_it_would_be_wrong_it_is_an_error(case):
    how, axes, why = WRONG[case]
    more = {"least": 16} if how is fully_shard else {}
    with pytest.raises(ValueError, match=why) as found:
        how(loss, PARAMS, X, mesh=make_mesh(**axes), **more)
    assert "is the kernel of one. Give the" in str(found.value)


def standardised(w):
    of = {"axis": (0, 1, 2), "keepdims": True}
    return (w - w.mean(**of)) / w.std(**of)


COMPUTED = {
    "standardised": lambda w, x: conv(x, standardised(w), 8),
    "masked": lambda w, x: conv(x, w * (jnp.abs(w) > 0.5), 8),
    "several": lambda w, x: jax.vmap(lambda w: conv(x, w, 8))(jnp.stack([w, w])).sum(0),
    "in a loop": lambda w, x: jax.lax.scan(
        lambda x, w: (conv(x, jnp.sin(w), 8), None), x, jnp.stack([w, w])
    )[0],
    "carried": lambda w, x: jax.lax.fori_loop(
        0, 2, lambda _, xw: (conv(*xw, 8), jnp.sin(xw[1])), (x, w)
    )[0],
}
NOT_TRAINED = {
    "a filter": lambda w, x: conv(x, jnp.ones((3, 3, 1, 8)), 8) * w.sum(),
    "stopped": lambda w, x: conv(x, jax.lax.stop_gradient(w), 8) * w.sum(),
    "where it is large": lambda w, x: conv(x, (w > 0) * 1.0, 8) * w.sum(),
    "one in a loop": lambda w, x: jax.lax.scan(
        lambda x, w: (conv(x, jnp.ones((3, 3, 1, 8)), 8) * w.sum(), None), x, w[None]
    )[0],
}


def computed(of):
    def fn(params, x):
        x = jnp.tanh(of(params["deep"], jnp.tanh(conv(x, params["in"], 1))))
        return (x.mean((1, 2)) @ params["out"]).var()

    return fn


@pytest.mark.parametrize("name", COMPUTED)
def test_kernels_that_are_computed_are_kernels_too(name):
    with pytest.raises(ValueError, match="deep is the kernel of one"):
        fully_shard(
            computed(COMPUTED[name]), PARAMS, X, mesh=make_mesh(data=2, sequence=4)
        )


def test_kernels_of_compressed_weights_are_named():
    fn, params = quantize(loss, PARAMS, X, formats={"deep": bfloat16, "**": None})
    with pytest.raises(ValueError, match="deep/values is the kernel of one"):
        fully_shard(fn, params, X, mesh=make_mesh(data=2, sequence=4))


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_kernels_without_a_gradient_are_none(name):
    fn, mesh = computed(NOT_TRAINED[name]), make_mesh(data=2, sequence=4)
    of_fn, placed = fully_shard(fn, PARAMS, X, mesh=mesh)
    x = jax.device_put(X, batch_sharding(mesh, 8))
    got, want = jax.jit(jax.grad(of_fn))(placed, x), jax.grad(fn)(PARAMS, X)
    for path in PARAMS:
        # What XLA gets wrong is so by factors; these sums cancel but for a thousandth.
        most = np.abs(want[path]).max()
        np.testing.assert_allclose(got[path], want[path], atol=1e-3 * most)


RIGHT = {
    "data alone": (fully_shard, {"data": 8}),
    "data and parts": (fully_shard, {"data": 4, "fsdp": 2}),
    "the kernel split": (shard, {"data": 4, "tensor": 2}),
    "no batch": (shard, {"data": 1, "tensor": 8}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_elsewhere_it_is_right(case):
    how, axes = RIGHT[case]
    mesh = make_mesh(**axes)
    more = {"least": 16} if how is fully_shard and mesh.shape["fsdp"] > 1 else {}
    fn, placed = how(loss, PARAMS, X, mesh=mesh, **more)
    np.testing.assert_allclose(wrong_by(fn, placed, mesh), 0, atol=1e-5)


def test_a_pipeline_with_them_is_refused_too():
    block = lambda w, x, key: jnp.tanh(conv(x, w["deep"], 8))
    stages = Stages(one_f_one_b(2, 2), 2)
    run = pipeline(
        lambda ends, x, key: conv(x, ends["in"], 1),
        block,
        lambda ends, x, batch: (x.mean((1, 2)) @ ends["out"]).var(),
        stages,
        make_mesh(pipe=2, fsdp=2, tensor=2),
    )
    deep = {"deep": jnp.stack([PARAMS["deep"]] * 2)}
    ends = {name: PARAMS[name] for name in ("in", "out")}
    with pytest.raises(ValueError, match="copies along tensor, .* stages/deep is the"):
        run(Pipelined(ends, stages.split(deep)), X)
