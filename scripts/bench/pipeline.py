"""What a pipeline's schedule costs: idle time, memory, and what is sent.

    python scripts/bench/pipeline.py

On virtual devices of the CPU, so nothing is timed: the idle part is that of the table,
beside the published formula; the memory is what the compiler plans for each device
(`memory_analysis`); the bytes are read from the compiled program, beside those of the
ticks in which some stage has something to hand on. Every schedule has to compute the
loss and the gradient that one device computes. Exits 1 where anything is not as it
should be.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from jaxeff.parallelism import (
    audit,
    gpipe,
    make_mesh,
    one_f_one_b,
    pipeline,
    Pipelined,
    Schedule,
    Stages,
    zero_bubble,
)
from jaxeff.parallelism.tables import make_table
from jaxeff.program import table
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json

VOCAB, EXAMPLES = 256, 4  # examples of a microbatch
NEAR = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    devices: int = 4
    """Stages of the pipeline; each with two parts of it where they are interleaved."""
    microbatches: tuple[int, ...] = (4, 16, 64)
    """How many a batch is cut into."""
    layers: int = 8
    """Of the model, a stack of residual MLPs between a tied embedding and its head."""
    width: int = 64
    """Of the model."""
    length: int = 64
    """Tokens of an example."""
    output: Path = Path("benchmarks/pipeline.json")
    """JSON file for the results."""


def embed(ends: Any, tokens: Any, key: Any) -> Any:
    """Before the first layer."""
    return ends["embed"][tokens[:, :-1]]


def block(w: Any, x: Any, key: Any) -> Any:
    """One layer."""
    return x + jax.nn.gelu(x @ w["up"]) @ w["down"]


def head(ends: Any, x: Any, tokens: Any) -> Any:
    """The mean loss of a microbatch."""
    logits = x @ ends["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def weights(c: Config) -> tuple[Any, Any]:
    """Of the ends, and of the stacked layers."""
    k1, k2, k3 = jr.split(jr.key(0), 3)
    d = c.width
    blocks = {
        "up": jr.normal(k2, (c.layers, d, 4 * d)) / d**0.5,
        "down": jr.normal(k3, (c.layers, 4 * d, d)) / (8 * d**0.5),
    }
    return {"embed": jr.normal(k1, (VOCAB, d)) / d**0.5}, blocks


def whole(params: Any, tokens: Any) -> Any:
    """The loss on one device."""
    ends, blocks = params
    x = embed(ends, tokens, None)
    x, _ = jax.lax.scan(lambda x, w: (block(w, x, None), None), x, blocks)
    return head(ends, x, tokens)


def schedules(c: Config, m: int) -> list[tuple[Schedule, bool, float]]:
    """Each with whether stages are computed again, and the published idle part."""
    p = c.devices
    plain, interleaved = (p - 1) / (m + p - 1), (p - 1) / (2 * m + p - 1)
    return [
        (gpipe(p, m), True, plain),
        (gpipe(p, m), False, plain),
        (one_f_one_b(p, m), True, plain),
        (one_f_one_b(p, m), False, plain),
        (one_f_one_b(p, m, 2), True, interleaved),
        (zero_bubble(p, m), False, (p - 1) / (3 * m + p - 1)),
    ]


def measure(
    c: Config, schedule: Schedule, remat: bool, published: float, one: tuple[Any, Any]
) -> dict[str, Any]:
    """One row."""
    ends, blocks = weights(c)
    mesh = make_mesh(pipe=c.devices, devices=jax.devices()[: c.devices])
    cut = Stages(schedule, c.layers)
    params = cut.place(Pipelined(ends, cut.split(blocks)), mesh)
    tokens = batch(c, schedule.microbatches)
    run = pipeline(embed, block, head, cut, mesh, remat=remat)
    compiled = run.lower(params, tokens).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    loss, grads = run(params, tokens)
    want, of_whole = one
    off = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()),
        (loss, grads.ends, cut.join(grads.stages)),
        (want, *of_whole),
    )
    lanes = make_table(schedule)
    activation = EXAMPLES * c.length * c.width * 4
    sent = audit(compiled, mesh).of("collective-permute", "pipe").bytes
    return {
        "schedule": schedule.name,
        "remat": remat,
        "microbatches": schedule.microbatches,
        "bubble": schedule.bubble(),
        "published": published,
        "held": max(schedule.held()),
        "temp_bytes": memory.temp_size_in_bytes,
        "sent_bytes": sent,
        "table_bytes": lanes.sent * activation,
        "least_bytes": lanes.needed * activation,
        "off": max(jax.tree.leaves(off)),
    }


def batch(c: Config, microbatches: int) -> Any:
    """Random tokens."""
    return jr.randint(jr.key(1), (EXAMPLES * microbatches, c.length + 1), 0, VOCAB)


def run(c: Config) -> None:
    """All rows, and the table."""
    if jax.device_count() < c.devices:
        raise ValueError(
            f"--devices {c.devices} needs as many devices, but there are "
            f"{jax.device_count()}. Ask for fewer, or set JAX_NUM_CPU_DEVICES."
        )
    if min(c.microbatches) < c.devices:
        raise ValueError(
            f"the published formulas are for as many microbatches as devices or more, "
            f"but {min(c.microbatches)} is below {c.devices}. Ask for more."
        )
    rows = []
    for m in c.microbatches:
        of = jax.jit(jax.value_and_grad(whole))
        one = of(weights(c), batch(c, m))
        for schedule, remat, published in schedules(c, m):
            print(f"{schedule.name}, {m} microbatches", flush=True)
            rows.append(measure(c, schedule, remat, published, one))
    wrong = [
        r
        for r in rows
        if r["off"] > NEAR
        or abs(r["bubble"] - r["published"]) > 1e-9
        or r["sent_bytes"] != r["table_bytes"]
    ]
    options = {k: v for k, v in vars(c).items() if k != "output"}
    write_json(c.output, about() | {"options": options, "rows": rows})
    print(shown(rows))
    if wrong:
        sys.exit(f"{len(wrong)} rows are not as they should be: {wrong}")


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = (
        "schedule",
        "stages are",
        "m",
        "idle",
        "published",
        "inputs held",
        "temp MiB",
        "sent / least",
        "off by",
    )
    return table(
        head,
        [
            (
                r["schedule"],
                "computed again" if r["remat"] else "kept",
                str(r["microbatches"]),
                f"{r['bubble']:.1%}",
                f"{r['published']:.1%}",
                str(r["held"]),
                f"{r['temp_bytes'] / 2**20:.2f}",
                f"{r['sent_bytes'] / max(1, r['least_bytes']):.2f}",
                f"{r['off']:.0e}",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    # Before any backend starts.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)
    main(run, Config, description=__doc__)
