"""Several kinds of parallelism at once are one device: value, gradient, ten steps."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff.models import build
from jaxeff.parallelism import batch_sharding, fully_shard, make_mesh, shard

WORDS = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}
GROUPED = {**WORDS, "n_kv_heads": 4, "hidden": 64}
tokens = lambda: jnp.arange(128).reshape(8, 16) % 64
images = lambda: jr.normal(jr.key(1), (8, 32, 32, 3))
MODELS = {
    "gpt": (lambda: build("gpt", **WORDS), tokens),
    "bert": (lambda: build("bert", **WORDS), tokens),
    "llama": (lambda: build("llama", **GROUPED, scan=True), tokens),
    "vit": (lambda: build("vit", d_model=32, n_heads=4, n_layers=2), images),
    "resnet20": (lambda: build("resnet20"), images),
    "mobilenet": (lambda: build("mobilenet"), images),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4, "data": 1},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x tensor": {"data": 4, "tensor": 2},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
IMAGES = {"resnet20": ("data x tensor", "data x fsdp x tensor"), "mobilenet": ("fsdp",)}
CASES = [(model, mesh) for model in MODELS for mesh in IMAGES.get(model, MESHES)]
SLOW = {
    f"test_together_they_are_one_device[{model}-{mesh}]"
    for model, mesh in CASES
    if (model, mesh) != ("llama", "data x fsdp x tensor")
}


def near(got, want, rel):
    most = max(np.abs(a).max() for a in jax.tree.leaves(want))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rel, atol=rel * most)


def ten_steps(loss, params, x):
    """Value, gradient, and the weights after ten steps."""
    tx = optax.sgd(1e-2, momentum=0.9)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads

    state, first = tx.init(params), None
    for _ in range(10):
        params, state, value, grads = jax.block_until_ready(step(params, state))
        first = first or (value, grads)
    return *first, params


@pytest.mark.parametrize("model, axes", CASES)
def test_together_they_are_one_device(model, axes):
    make, data = MODELS[model]
    net, x = make(), data()
    params = jax.jit(net.init)(jr.key(0), x)
    loss = lambda params, x: (net.apply(params, x) ** 2).mean()
    want = ten_steps(loss, params, x)

    sizes = MESHES[axes]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(**sizes, devices=devices)
    fn, placed = shard(loss, params, x, mesh=mesh)
    fn, placed = fully_shard(fn, placed, x, mesh=mesh, least=64)
    got = ten_steps(fn, placed, jax.device_put(x, batch_sharding(mesh, len(x))))
    near(got[:2], want[:2], rel=1e-5)
    near(got[2], want[2], rel=1e-5)
