"""How well does a language model train when its gradients are sent in fewer bytes?

    python scripts/bench/gradient_compression.py --data FILE

Trains the same transformer on the same batches of a text, data parallel, with the mean
of the gradient in full and compressed in each way, and compares the loss on the part of
the text that was kept back; the loss on a tenth of the text it learned from shows what
it knows by heart. AdamW takes what was sent, clipped; or ("divided") each device
divides its own gradient as Adam does, and that is sent (`parallelism.apart`). What each
way sends is read from the compiled step, and has to be what the transform says. Each
finished row is in `--output`, and a second run goes on from there. Exits 1 where
something else is sent.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import optax

from jaxeff import data, parallelism
from jaxeff.parallelism import audit, batch_sharding, Compression, make_mesh, replicate
from jaxeff.program import table
from jaxeff.training import fit, init_state, make_train_step
from jaxeff.training.cli import main
from jaxeff.training.language import language_loss, nats_per_token
from scripts.bench.one_gpt import adamw, DECAY, every_way, language, Options

COMPRESSIONS: dict[str, Callable[..., Compression]] = {
    "in full": parallelism.average,
    "8 bits": functools.partial(parallelism.rounded, 8, block=1024),
    "float8": functools.partial(parallelism.float8, block=1024),
    "4 bits": functools.partial(parallelism.rounded, 4),
    "1 bit": functools.partial(parallelism.rounded, 1),
    "PowerSGD, rank 4": functools.partial(parallelism.powersgd, 4),
    "PowerSGD, rank 16 in 8 bits": functools.partial(
        parallelism.powersgd, 16, bits=8, block=1024
    ),
    "PowerSGD, rank 32 in 4 bits": functools.partial(
        parallelism.powersgd, 32, bits=4, block=128
    ),
    "top 1 %": functools.partial(parallelism.top_k, 0.01),
    "random 5 %": functools.partial(parallelism.random_k, 0.05),
}
DIVIDED = ", divided"
WAYS = (*COMPRESSIONS, *(name + DIVIDED for name in COMPRESSIONS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options."""

    output: Path = Path("benchmarks/gradient_compression.json")
    """JSON file for the results, and to go on from."""


def optimizer(
    name: str, rate: optax.Schedule, devices: int
) -> tuple[optax.GradientTransformation, Compression]:
    """The optimizer, and what is sent in it."""
    compression = COMPRESSIONS[name.removesuffix(DIVIDED)](devices=devices)
    if not name.endswith(DIVIDED):
        return optax.chain(compression, adamw(rate)), compression
    divided = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_rms(DECAY, eps_in_sqrt=False, bias_correction=True),
    )
    # A device alone sees a batch n times smaller: where noise is most of a gradient,
    # its root mean square is larger by the root of n, and what it divides too small.
    same = math.sqrt(devices)
    tx = optax.chain(
        parallelism.apart(divided, devices=devices),
        compression,
        optax.ema(0.9),
        optax.add_decayed_weights(1e-4 / same),
        optax.scale_by_learning_rate(lambda step: same * rate(step)),
    )
    return tx, compression


def measure(c: Config, name: str) -> dict[str, Any]:
    """Trains with one way."""
    mesh = make_mesh()
    devices = mesh.shape["data"]
    task = language(c)
    to = batch_sharding(mesh, c.batch_size)
    windows = lambda: data.windows(task.train, c.batch_size, c.length)
    first, params = next(windows()), task.params
    tx, compression = optimizer(name, c.rate, devices)
    step = make_train_step(language_loss(task.train_fn), tx, per_device=mesh)
    state = init_state(params, tx, jr.key(1))
    compiled = jax.jit(step).lower(state, jax.device_put(first, to)).compile()
    # The loss, which every step averages too, is 4 bytes.
    sent = audit(compiled, mesh).of(axes="data").sent - 2 * (devices - 1) / devices * 4
    state = fit(
        step,
        replicate(state, mesh),
        data.prefetch(windows(), to),
        steps=c.steps,
    )
    trained = jax.device_get(state.params)
    known = task.train[: len(task.held_back)]
    on = lambda text: nats_per_token(task.eval_fn, trained, text, c.length)
    return {
        "way": name,
        "loss": on(task.held_back),
        "loss on what it learned from": on(known),
        "sent": sent,
        "said": compression.sent(params),
    }


def run(c: Config) -> None:
    """Every row that is not there yet; then the table."""
    if jax.device_count() == 1:
        raise ValueError(
            "one device sends nothing. On a CPU set JAX_NUM_CPU_DEVICES to 2 or more."
        )
    measured = functools.partial(measure, c)
    rows = every_way(c, WAYS, measured, devices=jax.device_count())
    print(shown(rows))
    wrong = [r["way"] for r in rows if abs(r["sent"] / r["said"] - 1) > 1e-6]
    if wrong:
        sys.exit(f"sent is something else than what is said: {', '.join(wrong)}")


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    full = next(r for r in rows if r["way"] == "in full")
    head = ("gradient", "", "loss", "more", "seen text", "bytes a step", "fewer")
    return table(
        head,
        [
            (
                r["way"],
                "",
                f"{r['loss']:.4f}",
                f"{r['loss'] / full['loss'] - 1:+.2%}",
                f"{r['loss on what it learned from']:.4f}",
                f"{r['sent']:,.0f}",
                f"{full['sent'] / r['sent']:.1f}x",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    # Before any backend starts.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 4)
    main(run, Config, description=__doc__)
