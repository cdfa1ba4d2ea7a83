"""Several kinds of parallelism at once are one device: value, gradient, ten steps."""

import jax
import numpy as np
import pytest

from jaxeff.parallelism import batch_sharding, fully_shard, make_mesh, shard
from tests.parallelism.models import loss_problem, near, ten_steps

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4, "data": 1},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x tensor": {"data": 4, "tensor": 2},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
MODELS = ("gpt", "bert", "llama scanned", "vit", "resnet20", "mobilenet")
IMAGES = {"resnet20": ("data x tensor", "data x fsdp x tensor"), "mobilenet": ("fsdp",)}
CASES = [(model, mesh) for model in MODELS for mesh in IMAGES.get(model, MESHES)]
SLOW = {
    f"test_together_they_are_one_device[{model}-{mesh}]"
    for model, mesh in CASES
    if (model, mesh) != ("llama scanned", "data x fsdp x tensor")
}


@pytest.mark.parametrize("model, axes", CASES)
def test_together_they_are_one_device(model, axes):
    loss, params, x = loss_problem(model, examples=8)
    want = ten_steps(loss, params, x)

    sizes = MESHES[axes]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(**sizes, devices=devices)
    fn, placed = shard(loss, params, x, mesh=mesh)
    fn, placed = fully_shard(fn, placed, x, mesh=mesh, least=64)
    split = [not w.sharding.is_fully_replicated for w in jax.tree.leaves(placed)]
    assert any(split) == (mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    got = ten_steps(fn, placed, jax.device_put(x, batch_sharding(mesh, len(x))))
    near(got[:2], want[:2])
    near(got[2], want[2])
