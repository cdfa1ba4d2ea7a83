"""Every kind of parallelism over the devices of several processes.

    python scripts/launch.py --processes 4 --devices 2 -- tests/parallelism/processes.py

Process 0 compares value, gradient and ten steps with one device, and prints a line for
each case that holds.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import (
    all_to_all_attention,
    batch_sharding,
    batch_share,
    fully_shard,
    layer_parallel,
    make_mesh,
    mixture_of_experts,
    one_f_one_b,
    pipeline,
    Pipelined,
    replicate,
    ring_attention,
    shard,
    Stages,
)
from jaxeff.training.cli import join_processes
from tests.parallelism.models import loss_problem, near, ten_steps

DEVICES = 8
MESHES = {
    "gpt": (
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 4, "data": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "llama scanned": ({"fsdp": 4, "tensor": 2},),
    "resnet20": ({"data": 4, "tensor": 2},),
}
# What is printed, case by case.
CASES = [
    *(f"{name} {axes}" for name, meshes in MESHES.items() for axes in meshes),
    *("layers", "pipeline", "ring_attention", "all_to_all_attention", "experts"),
]


def whole(tree):
    """What all processes hold together, in each of them."""
    return process_allgather(tree, tiled=True)


def on(devices, sharding_of, x):
    """Each process gives its share of the examples, as its data pipeline does."""
    index, count = batch_share(devices)
    rows = len(x) // count
    part = np.asarray(x)[index * rows : (index + 1) * rows]
    return jax.make_array_from_process_local_data(sharding_of, part)


def compare(name, got, want):
    """In one process, what all hold together with what one device computes."""
    if jax.process_index() == 0:
        near(got, want())
        print(name, flush=True)


def models():
    for name, meshes in MESHES.items():
        loss, params, x = loss_problem(name, examples=8)
        params, x = jax.device_get((params, x))
        for axes in meshes:
            mesh = make_mesh(**axes)
            fn, placed = shard(loss, params, x, mesh=mesh)
            fn, placed = fully_shard(fn, placed, x, mesh=mesh, least=64)
            batch = on(mesh, batch_sharding(mesh, len(x)), x)
            got = ten_steps(fn, placed, batch)
            compare(f"{name} {axes}", whole(got), partial(ten_steps, loss, params, x))


def layers():
    loss, params, x = loss_problem("gpt", layers=4)
    params, x = jax.device_get((params, x))
    mesh = make_mesh(pipe=4, data=2)
    layered, weights = layer_parallel(loss, params, x, mesh=mesh)
    batch = on(mesh, batch_sharding(mesh, len(x)), x)
    value, grads, new = ten_steps(layered, weights, batch)
    joined = whole(value), layered.join(whole(grads)), layered.join(whole(new))
    compare("layers", joined, lambda: ten_steps(loss, params, x))


def stages():
    """A pipeline of four stages, whose microbatches two devices share."""
    keys = jr.split(jr.key(0), 3)
    ends = {"embed": jr.normal(keys[0], (32, 16)) / 4}
    blocks = {"up": jr.normal(keys[1], (4, 16, 16)) / 4}
    tokens = np.asarray(jr.randint(keys[2], (16, 9), 0, 32))
    embed = lambda ends, tokens, key: ends["embed"][tokens[:, :-1]]
    block = lambda w, x, key: x + jax.nn.gelu(x @ w["up"])

    def head(ends, x, tokens):
        logits = x @ ends["embed"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def loss(params, tokens):
        x = embed(params[0], tokens, None)
        for i in range(4):
            x = block(jax.tree.map(lambda a, i=i: a[i], params[1]), x, None)
        return head(params[0], x, tokens)

    mesh = make_mesh(pipe=4, data=2)
    cut = Stages(one_f_one_b(4, 4), 4)
    params = jax.device_get((ends, blocks))
    placed = cut.place(Pipelined(params[0], cut.split(params[1])), mesh)
    run = jax.jit(pipeline(embed, block, head, cut, mesh))
    value, grads = run(placed, on(mesh, batch_sharding(mesh), tokens), None)
    value, grads = whole((value, grads))
    got = value, (grads.ends, cut.join(grads.stages))
    compare("pipeline", got, lambda: jax.value_and_grad(loss)(params, tokens))


def sequence():
    mesh = make_mesh(sequence=DEVICES)
    q = np.asarray(jr.normal(jr.key(0), (2, 32, 8, 8)))
    placed = jax.device_put(q, NamedSharding(mesh, P(None, "sequence")))
    plain = lambda q: jnp.sin(jax.nn.dot_product_attention(q, q, q, is_causal=True))
    for way in (ring_attention, all_to_all_attention):
        spread = jax.shard_map(
            lambda q, way=way: way(q, q, q, "sequence", causal=True),
            mesh=mesh,
            in_specs=P(None, "sequence"),
            out_specs=P(None, "sequence"),
            check_vma=False,
        )
        run = jax.jit(jax.value_and_grad(lambda q, f=spread: jnp.sin(f(q)).sum()))
        want = lambda: jax.value_and_grad(lambda q: plain(q).sum())(q)
        compare(way.__name__, whole(run(placed)), want)


def experts():
    mesh = make_mesh(expert=DEVICES)
    keys = jr.split(jr.key(0), 3)
    up = np.asarray(jr.normal(keys[0], (8, 8, 8)))
    x = np.asarray(jr.normal(keys[1], (64, 8)))
    router = np.asarray(jr.normal(keys[2], (8, 8)))
    expert = lambda w, x: jax.nn.relu(x @ w)
    spread = jax.shard_map(
        lambda w, x, logits: (
            mixture_of_experts(expert, w, x, logits, "expert", k=2, capacity=8.0).y
        ),
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
        check_vma=False,
    )

    def by_hand(w, x, logits):
        chances = jax.nn.softmax(logits)
        gates = jnp.where(chances >= jax.lax.top_k(chances, 2)[0][:, -1:], chances, 0)
        gates = gates / gates.sum(-1, keepdims=True)
        return jnp.einsum("te,etd->td", gates, jax.vmap(expert, (0, None))(w, x))

    def graded(fn):
        loss = lambda w, x, router: jnp.sin(fn(w, x, x @ router)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    split = NamedSharding(mesh, P("expert"))
    placed = [jax.device_put(a, split) for a in (up, x)]
    got = graded(spread)(*placed, replicate(router, mesh))
    compare("experts", whole(got), lambda: graded(by_hand)(up, x, router))


def main():
    join_processes()
    assert jax.process_count() > 1 and jax.device_count() == DEVICES
    for part in (models, layers, stages, sequence, experts):
        part()


if __name__ == "__main__":
    main()
