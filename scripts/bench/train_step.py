"""The library's training step and loop against a hand-written jit/optax loop.

    python scripts/bench/train_step.py --output benchmarks/train_step.json

The same models, data, optimizer and random keys, three ways: a step and a loop
written by hand; the library's step in a loop written by hand; the library's step in
`fit`, which also reads every loss. The ways take turns, a few steps each, many
times, and the result is the median over the turns of the ratio to the hand-written
loop of the same turn, so that a busy machine slows all alike: in wall time, and in
processor time of all threads, which a neighbour disturbs far less. The hand-written
loop runs once more as `control`: how far its ratio is from 1 is the error of the
others. All have to end with the same weights. Exits 1 where they do not, or where the
step takes over 2 % more wall time than by hand. On a busy machine that ratio is
noise: trust a run whose control is near 1.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.data import Batch
from jaxeff.models import build
from jaxeff.training import Aux, fit, init_state, make_train_step
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json

TX = optax.adamw(1e-3)
WAYS = ("by hand", "control", "step", "fit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its images, and how many steps make a turn."""

    model: str
    image: tuple[int, int, int]
    batch_size: int
    steps: int


CASES = (
    Case(model="mlp", image=(8, 8, 1), batch_size=512, steps=30),
    Case(model="cnn", image=(8, 8, 1), batch_size=128, steps=4),
    Case(model="resnet20", image=(32, 32, 3), batch_size=32, steps=1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    turns: int = 201
    """Turns of each way, per model."""
    limit: float = 1.02
    """Largest ratio of the step's time to the hand-written one's that passes."""
    output: Path | None = None
    """JSON file for the results; None writes none."""


def run(config: Config) -> None:
    """Measures every case, prints and writes the results."""
    results = {case.model: measure(case, config.turns) for case in CASES}
    for model, result in results.items():
        for way in WAYS:
            row = result[way]
            low, high = row["wall_quartiles"]
            print(
                f"{model:9} {way:8} {1e3 * row['seconds_per_step']:8.3f} ms/step"
                f"  wall x {row['wall']:.3f} ({low:.3f} to {high:.3f})"
                f"  processor x {row['processor']:.3f}"
            )
        print(f"{model:9} same weights in the end: {result['same_weights']}")
    if config.output is not None:
        write_json(config.output, about() | {"cases": results})
    good = all(
        r["same_weights"] != "no" and r["step"]["wall"] <= config.limit
        for r in results.values()
    )
    sys.exit(0 if good else 1)


def measure(case: Case, turns: int) -> dict[str, Any]:
    """Times the ways of one case in turns."""
    model = build(case.model, classes=10)
    data = list(fixed_batches(case))
    variables = model.init(jr.key(0), data[0].images)
    ways = {
        "by hand": by_hand(model, variables),
        "control": by_hand(model, variables),
        "step": with_step(model, variables),
        "fit": with_fit(model, variables),
    }
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    params: dict[str, Any] = {}
    for turn in range(turns + 1):
        # Another way begins each time, so none always follows the same one.
        first = turn % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            stream = islice(cycle(data), case.steps)
            begin = time.perf_counter(), time.process_time()
            params[way] = jax.block_until_ready(ways[way](stream, case.steps))
            if turn > 0:  # the first turn compiles
                wall[way].append(time.perf_counter() - begin[0])
                processor[way].append(time.process_time() - begin[1])

    def result(way: str) -> dict[str, Any]:
        ratio = np.divide(wall[way], wall["by hand"])
        return {
            "seconds_per_step": float(np.median(wall[way])) / case.steps,
            "wall": float(np.median(ratio)),
            "wall_quartiles": np.quantile(ratio, (0.25, 0.75)).tolist(),
            "processor": float(
                np.median(np.divide(processor[way], processor["by hand"]))
            ),
        }

    return {
        **dataclasses.asdict(case),
        "turns": turns,
        "same_weights": same_weights(params),
        **{way: result(way) for way in WAYS},
    }


def fixed_batches(case: Case) -> Iterator[Batch]:
    """Eight batches on the device: this measures the step, not the input."""
    for key in jr.split(jr.key(1), 8):
        images = jr.normal(key, (case.batch_size, *case.image))
        yield Batch(images, jr.randint(key, (case.batch_size,), 0, 10))


def apply(model: Any, variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """The mean loss of a batch, and the variables that the model updates."""
    if "batch_stats" not in variables:
        logits, updates = model.apply(variables, batch.images), {}
    else:
        logits, updates = model.apply(
            variables, batch.images, True, mutable=["batch_stats"]
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean(), updates


Way = Callable[[Iterator[Batch], int], Any]


def by_hand(model: Any, variables: Any) -> Way:
    """What one writes without the library: params, state, optimizer, donated."""

    @jax.jit
    def start(variables):
        params = variables["params"]
        rest = {k: v for k, v in variables.items() if k != "params"}
        return params, rest, TX.init(params)

    def step(params, rest, opt_state, batch):
        def loss(params):
            return apply(model, {"params": params, **rest}, batch)

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), {**rest, **new}, opt_state, value

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    state = jax.tree.map(jnp.copy, start(variables))

    def run(stream, steps):
        nonlocal state
        for batch in stream:
            *state, _ = step(*state, batch)
        return {"params": state[0], **state[1]}

    return run


def library(model: Any, variables: Any) -> tuple[Any, Any]:
    """The library's step and its first state."""

    def loss(params, batch, key):
        value, updates = apply(model, params, batch)
        return value, Aux(updates=updates)

    state = init_state(variables, TX, jr.key(2), trainable="params/**")
    return make_train_step(loss, TX, trainable="params/**"), state


def with_step(model: Any, variables: Any) -> Way:
    """The library's step in a plain loop."""
    step, state = library(model, variables)

    def run(stream, steps):
        nonlocal state
        for batch in stream:
            state, _ = step(state, batch)
        return state.params

    return run


def with_fit(model: Any, variables: Any) -> Way:
    """The library's step in its loop."""
    step, state = library(model, variables)

    def run(stream, steps):
        nonlocal state
        until = int(state.step) + steps
        state = fit(step, state, stream, steps=until, progress=False)
        return state.params

    return run


def same_weights(params: dict[str, Any]) -> str:
    """ "bit for bit", "to rounding" or "no"."""
    first, *others = (jax.tree.leaves(params[way]) for way in WAYS)
    pairs = [(a, b) for other in others for a, b in zip(first, other, strict=True)]
    if all(np.array_equal(a, b) for a, b in pairs):
        return "bit for bit"
    close = all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    return "to rounding" if close else "no"


if __name__ == "__main__":
    main(run, Config, description=__doc__)
