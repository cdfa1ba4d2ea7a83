"""Is what a compiled program sends what the theory says?

    python scripts/bench/communication.py
    python scripts/bench/communication.py --on v5p:2x2x4 v6e:16x16

For each kind of parallelism a training step is compiled, its collectives are read
(`parallelism.audit`), and their bytes set beside those of the theory, which is
computed from the shapes of weights and activations alone. On virtual devices of the
CPU, and for TPUs that are not there (with `jaxeff[tpu]`): nothing runs, so models may
be as large as the mesh. Each finished row is in `--output`. Exits 1 where a ratio is
not 1.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff import parallelism, tree
from jaxeff.models import build
from jaxeff.parallelism import (
    Audit,
    audit,
    batch_sharding,
    make_mesh,
    tpu_devices,
)
from jaxeff.program import table
from jaxeff.training import Aux, forms, init_state, make_train_step
from jaxeff.training.cli import main
from jaxeff.training.results import about, rows_so_far, write_json

VOCAB, LAYERS, LENGTH, PARTS = 64, 3, 16, 4
# The scalar loss, which is averaged with the gradient.
LOSS = 4
NEAR = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    on: tuple[str, ...] = ("cpu",)
    """cpu, or a TPU topology by its name."""
    only: tuple[str, ...] = ()
    """Only these ways; all by default."""
    output: Path = Path("benchmarks/communication.json")
    """JSON file for the results, and to go on from."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a program sends, and what it should.

    Attributes:
        theory: bytes of the arrays that are exchanged, by what they are.
        sent: the same as read from the program.
    """

    theory: dict[str, float]
    sent: dict[str, float]


def llama(n: int) -> tuple[Callable, Any, Any]:
    """A loss, its weights' shapes and a batch's, for `n` devices in one axis.

    Every dim divides among them, and is so large that TPUs gather its parts: among 256
    chips parts of 64 KB were summed up with zeros, parts of 128 KB were gathered.
    """
    d = max(128, 16 * n)
    heads = d // 128
    sizes = {"d_model": d, "n_heads": heads, "n_kv_heads": heads, "hidden": 2 * d}
    model = build("llama", vocab_size=d, n_layers=LAYERS, scan=True, **sizes)
    tokens = jax.ShapeDtypeStruct((2 * n, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jr.key(0), tokens)
    fn, _ = forms(model, params)
    loss = lambda params, tokens: (fn(params, tokens) ** 2).mean()
    return loss, params, tokens


def on(mesh: Any, x: Any, *spec: Any) -> Any:
    """A shape on devices."""
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec))
    )


def size(arrays: Any) -> int:
    """Bytes of all arrays, in full."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def read(fn: Callable, mesh: Any, *args: Any, **options: Any) -> Audit:
    """What a function sends on a mesh."""
    return audit(jax.jit(fn, **options).lower(*args).compile(), mesh)


def data(devices: list, parts: int = 1) -> Found:
    """One sum of the gradients in a step, however many parts the batch has."""
    mesh = make_mesh(devices=devices)
    loss, params, tokens = llama(len(devices))
    tokens = jax.ShapeDtypeStruct((PARTS * len(devices), LENGTH), jnp.int32)
    tx = optax.chain(parallelism.average(devices=len(devices)), optax.sgd(0.1))
    objective = lambda params, batch, key: (loss(params, batch), Aux())
    step = make_train_step(objective, tx, accumulate=parts, per_device=mesh)
    state = jax.eval_shape(lambda p: init_state(p, tx, jr.key(0)), params)
    state = jax.tree.map(lambda x: on(mesh, x), state)
    found = read(step, mesh, state, on(mesh, tokens, "data"))
    return Found(
        {"gradients": size(params) + LOSS},
        {"gradients": found.of("all-reduce", "data").bytes},
    )


def in_parts(devices: list) -> Found:
    """The same with the batch in parts."""
    return data(devices, PARTS)


def fully_sharded(devices: list) -> Found:
    """Weights gathered for the forward and again for the backward, gradients summed."""
    n = len(devices)
    mesh = make_mesh(fsdp=n, devices=devices)
    loss, params, tokens = llama(n)
    # Scales stay whole: the backward may do without them.
    least = 2 * params["params"]["embed"]["embedding"].shape[1]
    fn, placed = parallelism.fully_shard(loss, params, tokens, mesh=mesh, least=least)
    to = batch_sharding(mesh, tokens.shape[0])
    tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=to)
    out = jax.tree.map(lambda s: s.sharding, placed)
    # As wide on the way as the weights are.
    with jax.default_matmul_precision("highest"):
        found = read(
            jax.value_and_grad(fn), mesh, placed, tokens, out_shardings=(None, out)
        )
    weights = jax.tree.leaves(placed)
    split = size([w for w in weights if any(w.sharding.spec)])
    # Looked up, so its backward does not need it.
    embedding = size(tree.paths(placed)["params/embed/embedding"])
    reduced = found.of("reduce-scatter").bytes + found.of("all-reduce").bytes
    return Found(
        {"weights": 2 * split - embedding, "gradients": size(weights) + LOSS},
        {"weights": found.of("all-gather").bytes, "gradients": reduced},
    )


def transformer(n: int) -> tuple[Callable, Any, Any]:
    """As Megatron has it: queries, keys and values in one product, and a plain MLP."""
    d, heads, each = max(128, 2 * n), n, 8
    shape = lambda *dims: jax.ShapeDtypeStruct((LAYERS, *dims), jnp.float32)
    params = {
        "qkv": shape(d, heads, 3 * each),
        "out": shape(heads, each, d),
        "up": shape(d, 4 * d),
        "down": shape(4 * d, d),
    }
    rms = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def block(x, w):
        qkv = jnp.einsum("bld,dhe->blhe", rms(x), w["qkv"])
        q, k, v = jnp.split(qkv, 3, -1)
        of = jax.nn.softmax(jnp.einsum("blhe,bmhe->bhlm", q, k))
        mixed = jnp.einsum("bhlm,bmhe->blhe", of, v)
        x = x + jnp.einsum("blhe,hed->bld", mixed, w["out"])
        return x + jax.nn.gelu(rms(x) @ w["up"]) @ w["down"], None

    loss = lambda params, x: (jax.lax.scan(block, x, params)[0] ** 2).mean()
    return loss, params, jax.ShapeDtypeStruct((1, LENGTH, d), jnp.float32)


def tensor(devices: list) -> Found:
    """Megatron: two sums of an activation in each block forward, and two backward."""
    n = min(len(devices), 16)
    mesh = make_mesh(tensor=n, devices=devices)
    loss, params, x = transformer(n)
    rows = 2 * len(devices)
    x = jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    plan = parallelism.plan_tensor(loss, params, x, devices=n)
    placed = {path: on(mesh, w, *plan.specs[path]) for path, w in params.items()}
    x = on(mesh, x, "data")
    activation = size(x) // mesh.shape["data"]
    with jax.default_matmul_precision("highest"):
        ahead = read(loss, mesh, placed, x)
        # Of the activations too, as a block in the middle of a model has to.
        both = read(jax.value_and_grad(loss, (0, 1)), mesh, placed, x)
    forward, all_of = (
        found.of("all-reduce", "tensor").bytes for found in (ahead, both)
    )
    return Found(
        {"forward": 2 * LAYERS * activation, "backward": 2 * LAYERS * activation},
        {"forward": forward, "backward": all_of - forward},
    )


def ring(devices: list) -> Found:
    """Each device sends 2 (n-1)/n of the array."""
    n = len(devices)
    mesh = make_mesh(devices=devices)
    x = jax.ShapeDtypeStruct((n, 256 * n), jnp.float32)
    run = jax.shard_map(
        lambda x: parallelism.ring_all_reduce(x, "data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    found = read(run, mesh, on(mesh, x, "data"))
    return Found(
        {"sums": 2 * (n - 1) / n * 256 * n * 4},
        {"sums": found.of("collective-permute", "data").sent},
    )


def pipeline(devices: list) -> Found:
    """1F1B: activations down, their gradients up, in every tick with a neighbour."""
    p = min(len(devices), 16)
    m, width, each = 2 * p, 128, len(devices) // p
    mesh = make_mesh(pipe=p, devices=devices)
    cut = parallelism.Stages(parallelism.one_f_one_b(p, m), 2 * p)
    ends = {"embed": jax.ShapeDtypeStruct((VOCAB, width), jnp.float32)}
    blocks = {"w": jax.ShapeDtypeStruct((2 * p, width, width), jnp.float32)}
    blocks = jax.eval_shape(cut.split, blocks)
    params = parallelism.Pipelined(
        jax.tree.map(lambda x: on(mesh, x), ends),
        jax.tree.map(lambda x: on(mesh, x, "pipe"), blocks),
    )
    run = parallelism.pipeline(
        lambda ends, tokens, key: ends["embed"][tokens],
        lambda w, x, key: x + jnp.tanh(x @ w["w"]),
        lambda ends, x, tokens: ((x @ ends["embed"].T) ** 2).mean(),
        cut,
        mesh,
    )
    tokens = jax.ShapeDtypeStruct((2 * m * each, LENGTH), jnp.int32)
    with jax.default_matmul_precision("highest"):
        found = read(run, mesh, params, on(mesh, tokens, "data"))
    activation = 2 * LENGTH * width * 4
    return Found(
        {"activations": 2 * (m + p - 2) * activation},
        {"activations": found.of("collective-permute", "pipe").bytes},
    )


WAYS = {
    "data": data,
    "data, in parts": in_parts,
    "fsdp": fully_sharded,
    "tensor": tensor,
    "ring": ring,
    "pipeline": pipeline,
}


def run(c: Config) -> None:
    """Every row that is not there yet; then the table."""
    if unknown := [name for name in c.only if name not in WAYS]:
        raise ValueError(
            f"there is no way {unknown[0]!r}. Choose of: {', '.join(WAYS)}."
        )
    rows = rows_so_far(c.output, {})
    for name in c.on:
        devices = jax.devices() if name == "cpu" else tpu_devices(name)
        for way in c.only or WAYS:
            if any((r["on"], r["way"]) == (name, way) for r in rows):
                continue
            began = time.perf_counter()
            found = WAYS[way](devices)
            seconds = time.perf_counter() - began
            print(f"{way} on {name}: {seconds:.0f} s", flush=True)
            rows += [
                {
                    "on": name,
                    "devices": len(devices),
                    "way": way,
                    "what": what,
                    "theory": theory,
                    "sent": found.sent[what],
                }
                for what, theory in found.theory.items()
            ]
            write_json(c.output, about() | {"options": {}, "rows": rows})
    print(shown(rows))
    wrong = [r for r in rows if abs(r["sent"] / r["theory"] - 1) > NEAR]
    if wrong:
        sys.exit(f"{len(wrong)} rows are not what the theory says")


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = ("on", "devices", "way", "what", "theory, bytes", "compiled", "ratio")
    return table(
        head,
        [
            (
                r["on"],
                str(r["devices"]),
                r["way"],
                r["what"],
                f"{r['theory']:,.0f}",
                f"{r['sent']:,.0f}",
                f"{r['sent'] / r['theory']:.2f}",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    # Before any backend starts.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)
    main(run, Config, description=__doc__)
