"""Every format on disk, and spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff.export import load_safetensors, save_safetensors
from jaxeff.quantization import (
    bfloat16,
    Codebook,
    fp8,
    int2,
    int3,
    int4,
    int8,
    log4,
    log4_sqrt2,
    mxfp4,
    mxfp6,
    mxfp8,
    nf4,
    nvfp4,
    quantize,
    uint4,
    w8a8,
)
from jaxeff.training import load_model, save_model

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_model_comes_back_from_disk_as_it_was[save_model-codebook4]",
}

FORMATS = {
    f.name: f
    for f in (
        int8, int4, int3, int2, uint4.grouped(16), w8a8, log4, log4_sqrt2, fp8,
        nf4.grouped(16), mxfp8, mxfp6, mxfp4, nvfp4, bfloat16, Codebook(4),
        Codebook(5, dim=4, stages=2),
        w8a8.with_activations("int8", range="mse"),
    )
}  # fmt: skip
RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
PARAMS = {"a": draw(64, 32), "b": draw(32, 64)}
X = draw(16, 64)


def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def make(name):
    return quantize(fn, PARAMS, X, formats=FORMATS[name], batches=[(X,)])


FAST = ("int4", "nvfp4", "codebook4")
EVERY = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in FORMATS]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", [save_model, save_safetensors])
def test_a_model_comes_back_from_disk_as_it_was(how, name, tmp_path):
    load = {save_model: load_model, save_safetensors: load_safetensors}[how]
    q_fn, q = make(name)
    how(tmp_path / "model", q_fn, q)
    again_fn, again, _ = load(tmp_path / "model", fn, PARAMS)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    for ours, theirs in zip(*map(jax.tree.leaves, (again, q)), strict=True):
        assert ours.dtype == theirs.dtype
        as_bytes = lambda x: np.asarray(x).view(np.uint8)
        np.testing.assert_array_equal(as_bytes(ours), as_bytes(theirs))
    np.testing.assert_array_equal(again_fn(again, X), q_fn(q, X))


@pytest.mark.parametrize("name", ["int4", "w8a8", "uint4 groups of 16", "mxfp4"])
def test_sharded_over_devices_it_computes_the_same(name):
    q_fn, q = make(name)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))

    def put(x, dim):
        spec = [None, None]
        if x.shape[dim] % 4 == 0:
            spec[dim] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    # Megatron's cut: columns of the first weight, rows of the second.
    sharded = {
        "a": jax.tree.map(lambda x: put(x, 1), q["a"]),
        "b": jax.tree.map(lambda x: put(x, 0), q["b"]),
    }
    run = jax.jit(q_fn)
    assert len(sharded["a"].values.sharding.device_set) == 4
    np.testing.assert_allclose(run(sharded, X), run(q, X), rtol=1e-5, atol=1e-5)
