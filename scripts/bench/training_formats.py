"""Does a language model train as well in few bits?

    python scripts/bench/training_formats.py --data FILE

Trains the same transformer on the same batches of a text: in float32; with bfloat16
products; with products in 8 bits, forward and backward; with optimizer states in 8 and
4 bits; and with both. Compares the loss on the part of the text that was kept back,
and the bytes of the optimizer's state. Each finished row is in `--output`, and a
second run goes on from there.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr

from jaxeff import data, tree
from jaxeff.precision import autocast
from jaxeff.program import table
from jaxeff.quantization import compress_state, low_precision
from jaxeff.training import fit, init_state, make_train_step
from jaxeff.training.cli import main
from jaxeff.training.language import language_loss, nats_per_token
from scripts.bench.one_gpt import adamw, every_way, language, Options

FLOAT32 = "float32"


class Way(NamedTuple):
    """How to train: what becomes of the model, and the bits of optimizer states."""

    products: Callable = lambda fn: fn
    states: int = 32


WAYS = {
    FLOAT32: Way(),
    "bfloat16 products": Way(lambda fn: autocast(fn, jnp.bfloat16)),
    "int8 products": Way(lambda fn: low_precision(fn, "int8")),
    "fp8 products": Way(lambda fn: low_precision(fn, "fp8")),
    "states in 8 bits": Way(states=8),
    "states in 4 bits": Way(states=4),
    "int8 products, states in 8 bits": Way(lambda fn: low_precision(fn, "int8"), 8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options."""

    output: Path = Path("benchmarks/training_formats.json")
    """JSON file for the results, and to go on from."""


def measure(c: Config, name: str) -> dict[str, Any]:
    """Trains in one way."""
    way = WAYS[name]
    task, tx = language(c), adamw(c.rate)
    if way.states != 32:
        tx = compress_state(tx, way.states)
    # The model as it trains is the model as it is measured, but for the products.
    loss = language_loss(way.products(task.train_fn))
    step = make_train_step(loss, tx)
    state = init_state(task.params, tx, jr.key(1))
    batches = data.windows(task.train, c.batch_size, c.length)
    state = fit(step, state, data.prefetch(batches), steps=c.steps)
    return {
        "way": name,
        "loss": nats_per_token(task.eval_fn, state.params, task.held_back, c.length),
        "state bytes": tree.tree_bytes(state.opt_state),
    }


def run(c: Config) -> None:
    """Every row that is not there yet; then the table."""
    print(shown(every_way(c, WAYS, functools.partial(measure, c))))


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    plain = next(r for r in rows if r["way"] == FLOAT32)
    return table(
        ("training", "loss", "more", "bytes of the optimizer's state"),
        [
            (
                r["way"],
                f"{r['loss']:.4f}",
                f"{r['loss'] / plain['loss'] - 1:+.2%}",
                f"{r['state bytes']:,}",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    main(run, Config, description=__doc__)
