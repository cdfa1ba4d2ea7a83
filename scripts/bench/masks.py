"""Unstructured pruning: what a step costs, and what accuracy is left.

    python scripts/bench/masks.py --output benchmarks/masks.json

Cost: on a tree of ten million weights, the time of one update with each transform
relative to its optimizer alone, on steps that rank the weights (due) and on those
that do not. The ways take turns, and each ratio is the median over the turns, in wall
time and in processor time of all threads, which a neighbour disturbs far less; `adam`
runs once more as `control`, whose distance from 1 is the error of the others. The
ranking alone is compared with a stable sort, which must give the same mask.

Accuracy: an MLP on the handwritten digits, each way with the same steps, batches and
learning rates, means over seeds. Exits 1 where a way ends with another number of
weights than it should, a dropped weight is not zero, or the sort's mask is another.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.data import Dataset, digits
from jaxeff.models import build
from jaxeff.pruning import (
    by_saliency,
    erk,
    global_ranking,
    keep_largest,
    masked,
    NofM,
    one_shot,
    polynomial,
    prune,
    prune_by_magnitude,
    PruneState,
    rigl,
    sparse_evolution,
)
from jaxeff.training import accuracy, forms
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json

Transform = optax.GradientTransformation
LONG = 10**6  # more steps than are run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    turns: int = 15
    """Turns of each way in the measure of cost."""
    layers: int = 4
    """Matrices of 1024 x 2560 weights in it."""
    steps: int = 1000
    """Training steps on the digits."""
    seeds: int = 3
    """Runs of each way on the digits."""
    sparsities: tuple[float, ...] = (0.9, 0.95)
    """Fractions of the weights that go."""
    output: Path | None = None
    """JSON file for the results; None writes none."""


def run(config: Config) -> None:
    """Measures both, prints and writes the results."""
    cost = measure_cost(config.layers, config.turns)
    for name, row in cost["ways"].items():
        low, high = row["wall_quartiles"]
        print(
            f"{name:24} {1e3 * row['seconds']:8.1f} ms  wall x {row['wall']:.2f} "
            f"({low:.2f} to {high:.2f})  processor x {row['processor']:.2f}",
            flush=True,
        )
    ranking = measure_ranking(config.layers)
    print(f"sorting takes x {ranking['sort']:.1f} of counting; same: {ranking['same']}")
    train, test = digits()
    found = measure_accuracy(config, train, test)
    if config.output is not None:
        options = dataclasses.asdict(config) | {"output": None}
        results = {"cost": cost, "ranking": ranking, "accuracy": found}
        write_json(config.output, about() | {"config": options} | results)
    right = ranking["same"] and all(row["exact"] for row in found)
    sys.exit(0 if right else 1)


def cost_ways() -> dict[str, Transform]:
    """Each transform by name; `adam` is what the others are compared with."""
    adam = optax.adam(1e-3)
    rising = polynomial(0.0, 0.9, begin=0, steps=LONG, every=1)
    resting = one_shot(0.9)
    after = lambda *args, **kw: optax.chain(adam, prune_by_magnitude(*args, **kw))
    pairs = NofM(2, 4, -2)
    half = polynomial(0.0, 0.5, begin=0, steps=LONG, every=1)
    return {
        "adam": adam,
        "control": adam,
        "magnitude, not due": after(resting),
        "magnitude local, due": after(rising),
        "magnitude global, due": after(rising, distribution=global_ranking),
        "2:4, due": after(half, pattern=pairs),
        "saliency, not due": prune(adam, resting, by_saliency(0.9)),
        "saliency, due": prune(adam, rising, by_saliency(0.9)),
        "rigl, not due": rigl(adam, 0.9, every=LONG, until=LONG),
        "rigl, due": rigl(adam, 0.9, every=1, until=LONG),
    }


def measure_cost(layers: int, turns: int) -> dict[str, Any]:
    """Times one update of each way in turns."""
    keys = jr.split(jr.key(0), 2 * layers)
    shape = (1024, 2560)
    params = {f"w{i}": jr.normal(k, shape) for i, k in enumerate(keys[:layers])}
    grads = {f"w{i}": jr.normal(k, shape) for i, k in enumerate(keys[layers:])}
    ways = cost_ways()
    steps = {name: stepper(tx, params, grads) for name, tx in ways.items()}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    names, rng = list(ways), np.random.default_rng(0)
    for turn in range(turns + 2):
        # Another order each time: what ran before leaves its weights in the caches.
        for name in rng.permutation(names):
            # Short ones more than once, or the clock is part of what is measured.
            times = 1 if name.endswith(", due") else 8
            begin = time.perf_counter(), time.process_time()
            for _ in range(times):
                steps[name]()
            if turn > 1:  # the first turn compiles, and prunes where that is all
                wall[name].append((time.perf_counter() - begin[0]) / times)
                processor[name].append((time.process_time() - begin[1]) / times)

    def result(name: str) -> dict[str, Any]:
        ratio = np.divide(wall[name], wall["adam"])
        return {
            "seconds": float(np.median(wall[name])),
            "wall": float(np.median(ratio)),
            "wall_quartiles": np.quantile(ratio, (0.25, 0.75)).tolist(),
            "processor": float(
                np.median(np.divide(processor[name], processor["adam"]))
            ),
        }

    weights = sum(w.size for w in params.values())
    return {"weights": weights, "turns": turns, "ways": {n: result(n) for n in names}}


def measure_ranking(layers: int, turns: int = 3) -> dict[str, Any]:
    """`keep_largest` against a sort, on one array with many equals."""
    w = jnp.round(100 * jr.normal(jr.key(2), (layers * 1024, 2560))) / 100
    drop = round(0.9 * w.size)

    @jax.jit
    def by_sorting(w):
        order = jnp.argsort(jnp.abs(w), axis=None, stable=True)
        return jnp.ones(w.size, bool).at[order[:drop]].set(False).reshape(w.shape)

    by_counting = jax.jit(lambda w: keep_largest(w, 0.9))
    same = bool(jnp.array_equal(by_sorting(w), by_counting(w)))
    seconds: dict[str, list[float]] = {"sort": [], "count": []}
    for _ in range(turns):
        for name, fn in (("sort", by_sorting), ("count", by_counting)):
            begin = time.perf_counter()
            jax.block_until_ready(fn(w))
            seconds[name].append(time.perf_counter() - begin)
    ratio = float(np.median(np.divide(seconds["sort"], seconds["count"])))
    return {"weights": w.size, "same": same, "sort": ratio, "seconds": seconds}


def stepper(tx: Transform, params: Any, grads: Any) -> Callable[[], None]:
    """One more update of a run of its own at each call."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))

    def once() -> None:
        nonlocal carry
        carry = jax.block_until_ready(step(carry, grads))

    return once


def training_ways(sparsity: float, steps: int) -> dict[str, Callable[[int], Transform]]:
    """Each way to end with that sparsity, as a function of the seed."""
    adam = adam_of(steps)
    every = max(1, steps // 30)
    gradual = polynomial(0.0, sparsity, begin=5 * every, steps=15 * every, every=every)
    moving = {"every": every, "until": steps * 3 // 4}
    # Never due: the first masks stay.
    still = {"every": LONG, "until": LONG}
    return {
        "magnitude, local": lambda seed: prune(adam, gradual),
        "magnitude, global": lambda seed: prune(
            adam, gradual, distribution=global_ranking
        ),
        "magnitude, erk": lambda seed: prune(adam, gradual, distribution=erk),
        "snip": lambda seed: prune(
            adam, one_shot(sparsity), by_saliency(), distribution=global_ranking
        ),
        "rigl": lambda seed: rigl(adam, sparsity, seed=seed, **moving),
        "set": lambda seed: sparse_evolution(adam, sparsity, seed=seed, **moving),
        "static random, erk": lambda seed: rigl(adam, sparsity, seed=seed, **still),
    }


def measure_accuracy(
    config: Config, train: Dataset, test: Dataset
) -> list[dict[str, Any]]:
    """A row for each way and sparsity."""
    model = build("mlp", classes=10)
    eval_fn, _ = forms(model, {})
    rows = []
    dense = {0.0: {"dense": lambda seed: prune(adam_of(config.steps), one_shot(0.0))}}
    ways = dense | {s: training_ways(s, config.steps) for s in config.sparsities}
    for sparsity, named in ways.items():
        for name, make in named.items():
            fit = jax.jit(trainer(model, train, make(0), config.steps))
            found, exact, weights = [], True, 0
            for seed in range(config.seeds):
                params = model.init(jr.key(seed), jnp.asarray(train.images[:1]))
                # The seed of a transform is part of the program, but for the first
                # masks, which `init` draws: so one program serves all seeds.
                state = jax.jit(make(seed).init)(params)
                params, state = fit(masked(params, state), state, jr.key(100 + seed))
                found.append(accuracy(eval_fn, params, test))
                weights, good = check(params, state, sparsity)
                exact &= good
            rows.append(
                {
                    "way": name,
                    "sparsity": sparsity,
                    "accuracy": float(np.mean(found)),
                    "deviation": float(np.std(found, ddof=1)) if found[1:] else 0.0,
                    "accuracies": found,
                    "weights": weights,
                    "exact": exact,
                }
            )
            print(
                f"{name:24} {sparsity:5} {rows[-1]['accuracy']:.2%} "
                f"+- {rows[-1]['deviation']:.2%}  {weights} weights, right: {exact}",
                flush=True,
            )
    return rows


def adam_of(steps: int) -> Transform:
    """The optimizer of all ways."""
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


def trainer(model: Any, train: Dataset, tx: Transform, steps: int) -> Callable:
    """`fit(params, state, key) -> (params, state)`: the whole training in one scan."""
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)

    def fit(params, state, key):
        def step(carry, key):
            params, state = carry
            rows = jr.randint(key, (128,), 0, len(images))

            def loss(params):
                logits = model.apply(params, images[rows])
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, labels[rows]
                ).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jr.split(key, steps))[0]

    return fit


def check(params: Any, state: PruneState, sparsity: float) -> tuple[int, bool]:
    """How many weights are kept, and whether that is right and the others are zero."""
    left = masked(params, state)
    zeros = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(left), strict=True)
    )
    masks = jax.tree.leaves(state.mask)
    kept, size = sum(int(m.sum()) for m in masks), sum(m.size for m in masks)
    # Every layer rounds on its own.
    right = abs(kept - (1 - sparsity) * size) <= len(masks)
    return kept, zeros and right


if __name__ == "__main__":
    main(run, Config, description=__doc__)
