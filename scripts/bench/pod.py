"""Does a training step of a 70B LLaMA fit on 256 chips, and under which plan?

    python scripts/bench/pod.py     # with jaxeff[tpu]; needs no TPU

The model is given as shapes, those of LLaMA 3 70B: float32 weights and AdamW, products
in bfloat16, every layer computed again for the backward. For each plan one step is
compiled for the topology. The table has what the compiler plans for a chip, and what a
chip sends in a step. Each finished row is in `--output`, and a second run goes on from
there.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxeff import tree
from jaxeff.models import Llama, LlamaConfig
from jaxeff.models.llama import Block, LLAMA_3_70B, rope_tables, Shared
from jaxeff.parallelism import (
    audit,
    batch_sharding,
    fully_shard,
    make_mesh,
    one_f_one_b,
    pipeline,
    Pipelined,
    plan_tensor,
    Stages,
    tpu_devices,
)
from jaxeff.program import table
from jaxeff.training.cli import main
from jaxeff.training.results import about, rows_so_far, write_json

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    topology: str = "v6e:16x16"
    """Of the chips."""
    memory: float = 32.0
    """Of a chip, in GB."""
    plans: tuple[str, ...] = (
        "fsdp=256",
        "fsdp=64,tensor=4",
        "fsdp=32,tensor=8",
        "pipe=4,fsdp=8,tensor=8",
    )
    """Sizes of the axes of each mesh."""
    batch_size: int = 256
    """Sequences in a step."""
    length: int = 2048
    """Tokens of each."""
    microbatches: int = 16
    """Of a pipeline."""
    layers: int = LLAMA_3_70B.n_layers
    """Of the model."""
    output: Path = Path("benchmarks/pod.json")
    """JSON file for the results, and to go on from."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A value and gradient, and the shapes it takes, on their devices."""

    value_and_grad: Callable
    params: Any
    tokens: jax.ShapeDtypeStruct


def next_token_loss(logits: Any, tokens: Any) -> jax.Array:
    """The mean cross-entropy of each next token.

    Picked by comparison: XLA stopped (a check of libtpu 0.0.42) where words were looked
    up in arrays that are split, inside of a pipeline.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    words = jnp.arange(logits.shape[-1])[None, None]
    own = jnp.where(words == tokens[:, 1:, None], logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - own).mean()


def in_parts(fn: Callable, params: Any, *args: Any, mesh: Mesh) -> tuple[Callable, Any]:
    """Weights split over `tensor`, then over `fsdp`, as far as the mesh has them."""
    devices = mesh.shape["tensor"]
    if devices > 1:
        plan = plan_tensor(fn, params, *args, devices=devices)
        on = lambda path, w: jax.ShapeDtypeStruct(
            w.shape, w.dtype, sharding=NamedSharding(mesh, plan.specs[path])
        )
        weights = {path: on(path, w) for path, w in tree.paths(params).items()}
        params = tree.replaced(params, weights)
    return fully_shard(fn, params, *args, mesh=mesh)


def scanned(c: Config, config: LlamaConfig, mesh: Mesh) -> Step:
    """One scan over the layers."""
    model = Llama(config, scan=True, remat=True, dtype=jnp.bfloat16)
    shape = c.batch_size, c.length
    to = batch_sharding(mesh, c.batch_size)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=to)
    params = jax.eval_shape(model.init, jr.key(0), tokens)
    loss = lambda params, tokens: next_token_loss(model.apply(params, tokens), tokens)
    fn, params = in_parts(loss, params, tokens, mesh=mesh)
    return Step(jax.value_and_grad(fn), params, tokens)


def pipelined(c: Config, config: LlamaConfig, mesh: Mesh) -> Step:
    """1F1B; inside of a stage the layers are split over the other axes."""
    kinds = {"dtype": jnp.bfloat16}
    layer = Block(config, **kinds)
    positions = jnp.arange(c.length)
    shared = lambda: Shared(
        *rope_tables(positions, config.head_dim, config.rope_theta),
        positions[:, None] >= positions[None],
    )
    rows = P("fsdp")  # `data` is the pipeline's own

    def embed(ends, tokens, key):
        words = ends["embed"].astype(jnp.bfloat16)
        words = jax.lax.with_sharding_constraint(words, P(None, "tensor"))
        x = jax.lax.with_sharding_constraint(words[tokens], rows)
        # XLA wants no constraint at the very end of a branch.
        return x * jnp.bfloat16(1)

    def plain(weights, x):
        (x, _), _ = layer.apply({"params": weights}, (x, None), shared(), 0)
        return x

    def block(weights, x, key):
        return plain(weights, jax.lax.with_sharding_constraint(x, rows))

    def head(ends, x, tokens):
        norm = nn.RMSNorm(epsilon=config.norm_eps, **kinds)
        x: Any = norm.apply({"params": {"scale": ends["norm"]}}, x)
        return next_token_loss(x @ ends["head"].astype(x.dtype), tokens)

    cut = Stages(one_f_one_b(mesh.shape["pipe"], c.microbatches), config.n_layers)
    each = c.batch_size // c.microbatches
    x = jax.ShapeDtypeStruct((each, c.length, config.d_model), jnp.bfloat16)
    weights = jax.eval_shape(
        lambda: layer.init(jr.key(0), (jnp.zeros(x.shape, x.dtype), None), shared(), 0)
    )["params"]
    _, placed = in_parts(plain, weights, x, mesh=mesh)
    stages = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(
            (mesh.shape["pipe"], 1, max(cut.sizes), *w.shape),
            w.dtype,
            sharding=NamedSharding(mesh, P("pipe", None, None, *w.sharding.spec)),
        ),
        placed,
    )
    on = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    d, words = config.d_model, config.vocab_size
    ends = {
        "embed": on((words, d), "fsdp", "tensor"),
        "norm": on((d,)),
        "head": on((d, words), "fsdp", "tensor"),
    }
    tokens = jax.ShapeDtypeStruct(
        (c.batch_size, c.length), jnp.int32, sharding=batch_sharding(mesh)
    )
    run = pipeline(embed, block, head, cut, mesh)
    return Step(run, Pipelined(ends, stages), tokens)


def compiled(step: Step, mesh: Mesh) -> jax.stages.Compiled:
    """The whole step, with AdamW, its state in parts as the weights are."""
    tx: Any = optax.adamw(1e-4)
    whole = NamedSharding(mesh, P())
    state = optax.tree_map_params(
        tx,
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w.sharding),
        jax.eval_shape(tx.init, step.params),
        step.params,
        transform_non_params=lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=whole
        ),
    )

    def update(params, state, tokens):
        loss, grads = step.value_and_grad(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    out = jax.tree.map(lambda s: s.sharding, (step.params, state))
    run = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*out, whole))
    return run.lower(step.params, state, step.tokens).compile()


def mesh_of(plan: str, devices: list) -> Mesh:
    """A mesh from "fsdp=32,tensor=8"."""
    try:
        sizes = {k: int(n) for k, n in (part.split("=") for part in plan.split(","))}
    except ValueError:
        raise ValueError(
            f"a plan is written as in fsdp=32,tensor=8, got {plan!r}."
        ) from None
    return make_mesh(**sizes, devices=devices)


def measure(c: Config, config: LlamaConfig, plan: str, devices: list) -> dict[str, Any]:
    """One row."""
    mesh = mesh_of(plan, devices)
    began = time.perf_counter()
    step = (pipelined if mesh.shape["pipe"] > 1 else scanned)(c, config, mesh)
    program = compiled(step, mesh)
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    assert memory is not None
    kept = memory.argument_size_in_bytes
    rest = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sent = audit(program, mesh)
    return {
        "plan": plan,
        "parameters": sum(math.prod(w.shape) for w in jax.tree.leaves(step.params)),
        "state_gib": kept / GIB,
        "working_gib": (memory.temp_size_in_bytes + rest) / GIB,
        "sent_gib": {
            axis: sum(x.sent for x in sent.collectives if axis in x.axes) / GIB
            for axis in mesh.axis_names
            if mesh.shape[axis] > 1
        },
        "compile_seconds": seconds,
    }


def run(c: Config) -> None:
    """Every row that is not there yet; then the table."""
    shows = ("output", "plans", "memory")
    options = {k: v for k, v in dataclasses.asdict(c).items() if k not in shows}
    rows = rows_so_far(c.output, options)
    devices = tpu_devices(c.topology)
    config = dataclasses.replace(LLAMA_3_70B, n_layers=c.layers)
    for plan in c.plans:
        if any(r["plan"] == plan for r in rows):
            continue
        print(f"compiling {plan}", flush=True)
        rows.append(measure(c, config, plan, devices))
        write_json(c.output, about() | {"options": options, "rows": rows})
    print(shown(rows, c.memory))


def shown(rows: list[dict[str, Any]], memory: float) -> str:
    """The rows as a table; the best is the one that fits and sends least."""
    total = lambda r: r["state_gib"] + r["working_gib"]
    fits = lambda r: total(r) * GIB <= memory * 1e9
    sent = lambda r: sum(r["sent_gib"].values())
    best = min((r for r in rows if fits(r)), key=sent, default=None)
    head = ("plan", "state", "working", "GiB per chip", "sent, GiB", "")
    return table(
        head,
        [
            (
                r["plan"],
                f"{r['state_gib']:.1f}",
                f"{r['working_gib']:.1f}",
                f"{total(r):.1f}",
                ", ".join(f"{a} {n:.1f}" for a, n in r["sent_gib"].items()),
                "best" if r is best else "fits" if fits(r) else "too much",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    main(run, Config, description=__doc__)
