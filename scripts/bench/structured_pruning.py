"""Which score and which scope keep a trained ResNet-20 best at half of its FLOPs?

    export JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python scripts/bench/structured_pruning.py --data-dir DIR --load FILE

(On a CPU of two cores the first line makes training faster: a device for each core,
and memory in large pages.)

Shrinks the model to the budget by every score, within each coupling and over all of
them, measures it on the 10,000 test images of CIFAR-10, fine-tunes it (shifts and
mirror images, distilled from the dense model, AdamW) and measures it again: means
over the seeds. Each finished row is in `--output`, and a second run goes on from there.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import optax

from jaxeff import data, models, pruning
from jaxeff.distillation import response_loss, taught
from jaxeff.parallelism import batch_sharding, make_mesh, replicate
from jaxeff.program import trace
from jaxeff.pruning import Score, Selection
from jaxeff.training import (
    accuracy,
    classifier,
    fit,
    forms,
    init_state,
    make_train_step,
)
from jaxeff.training.cli import main
from jaxeff.training.results import about, rows_so_far, write_json
from scripts.bench.subjects import MEAN, STD

# Images that the scores look at.
LOOKED_AT = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    data_dir: Path
    """Folder with CIFAR-10."""
    load: Path
    """The trained ResNet-20, as .safetensors."""
    budget: float = 0.5
    """Fraction of the FLOPs that stays, in (0, 1)."""
    scores: tuple[str, ...] = ()
    """Only these scores; all by default."""
    scopes: tuple[str, ...] = ("local", "global")
    """Rank within each coupling, or over all of them."""
    only: str = "**"
    """Shrink only couplings whose weights all match: `params/stage*/**` is inside of
    residual blocks."""
    multiple: int = 4
    """Channels stay in multiples of this; others train more slowly on a CPU."""
    epochs: float = 1
    """Passes over the 20,000 training images after shrinking; 0 does not train."""
    rounds: int = 1
    """Shrink little by little, and train in between."""
    round_epochs: float = 3
    """Passes after each round but the last; `epochs` counts them in."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Of AdamW, at its peak; a cosine takes it to zero."""
    weight_decay: float = 1e-3
    """Of AdamW."""
    temperature: float = 10.0
    """Of the distillation."""
    mixup: float = 0.0
    """Share of the images that are mixed with another; only the teacher, who sees the
    same, is asked for these, so labels are left out if it is above 0."""
    plain: float = 0.0
    """Share of the steps, the last ones, in which no image is mixed."""
    seeds: int = 3
    """Runs of each row."""
    output: Path = Path("benchmarks/structured_pruning.json")
    """JSON file for the results, and to go on from."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The trained model and the data."""

    fn: Callable
    train_fn: Callable
    params: Any
    train: data.Dataset
    test: data.Dataset


def read(c: Config) -> Model:
    """Reads model and data."""
    train, test = data.load("cifar10", c.data_dir, mean=MEAN, std=STD)
    model, params = models.load_resnet20(c.load)
    fn, train_fn = forms(model, params)
    return Model(fn, train_fn, params, train, test)


def score_of(name: str, m: Model, seed: int) -> tuple[Score, str]:
    """A score, and how it is made comparable between couplings."""
    order = jr.permutation(jr.key(seed), len(m.train))[:LOOKED_AT]
    images, labels = m.train.images[order], m.train.labels[order]

    def loss(params, images, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            m.fn(params, images), labels
        )
        return losses.mean()

    parts = [slice(i, i + 32) for i in range(0, LOOKED_AT, 32)]
    batches = [(images[p], labels[p]) for p in parts]
    scores: dict[str, tuple[Score, str]] = {
        "random": (pruning.random(seed), "mean"),
        "L1": (pruning.magnitude(1), "mean"),
        "L2": (pruning.magnitude(2), "mean"),
        "LAMP": (pruning.lamp(), "none"),
        "norm scale": (pruning.norm_scale(), "none"),
        "geometric median": (pruning.geometric_median(), "mean"),
        "Taylor": (pruning.taylor(loss, batches), "none"),
        "Fisher": (pruning.fisher(loss, batches), "none"),
        "activation": (pruning.activation([(b[0],) for b in batches]), "mean"),
        "output error": (pruning.output_error([(images[:64],)]), "none"),
    }
    if name not in scores:
        raise ValueError(f"there is no score {name!r}. Choose of: {', '.join(scores)}.")
    return scores[name]


SCORES = (
    "random",
    "L1",
    "L2",
    "LAMP",
    "norm scale",
    "geometric median",
    "Taylor",
    "Fisher",
    "activation",
    "output error",
)


def shrink(
    c: Config, m: Model, score: str, scope: str, seed: int, at_most: float
) -> Selection:
    """What leaves, to fit the FLOPs."""
    scorer, normalize = score_of(score, m, seed)
    return pruning.select(
        m.fn,
        m.params,
        jnp.asarray(m.train.images[:1]),
        keep={c.only: 0.0},
        score=scorer,
        scope=scope,
        normalize=normalize,
        multiple=c.multiple,
        budget=pruning.flops(int(at_most)),
    )


def smaller(m: Model, chosen: Selection) -> Model:
    """The model without what leaves."""
    resize, params = chosen.resize, chosen.take(m.params)
    return dataclasses.replace(
        m, fn=resize(m.fn), train_fn=resize(m.train_fn), params=params
    )


def finetune(c: Config, m: Model, small: Model, epochs: float, seed: int) -> Model:
    """The smaller model trained with the dense one as its teacher."""
    steps = round(epochs * data.steps_per_epoch(m.train, c.batch_size))
    if steps == 0:
        return small
    rate = optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, max(1, steps // 20), max(2, steps)
    )
    tx = optax.adamw(rate, weight_decay=c.weight_decay)
    mesh = make_mesh()
    teacher = replicate(m.params, mesh)
    state = init_state(small.params, tx, jr.key(seed), trainable="params/**")
    state, done = replicate(state, mesh), 0
    for until, share in ((round(steps * (1 - c.plain)), c.mixup), (steps, 0.0)):
        if until == done:
            continue
        loss = distillation(c, m, small, share)
        step = taught(make_train_step(loss, tx, trainable="params/**"), teacher)
        batches = data.prefetch(
            data.batches(m.train, c.batch_size, seed=seed, start_step=done),
            batch_sharding(mesh, c.batch_size),
        )
        state, done = fit(step, state, batches, steps=until), until
    return dataclasses.replace(small, params=state.params)


def distillation(c: Config, m: Model, small: Model, share: float) -> Callable:
    """The loss, with that share of the images mixed."""
    shift = data.augmentation(m.train)

    def augment(key, images):
        first, second = jr.split(key)
        images = images if shift is None else shift(first, images)
        return mixed(second, images, share) if share else images

    student = classifier(small.train_fn, augment=augment)
    # Where some are mixed, none has labels, and the answers tell enough.
    weight = 1.0 if c.mixup else 0.9
    return response_loss(student, m.fn, temperature=c.temperature, weight=weight)


def mixed(key: Any, images: Any, share: float) -> Any:
    """A share of the images, each mixed with another of the batch.

    Source: Zhang et al. 2017, arXiv:1710.09412, with a uniform part; for a student
    alone: Beyer et al. 2022, arXiv:2106.05237, section 3.
    """
    one = (len(images), 1, 1, 1)
    part = jnp.maximum(x := jr.uniform(key, one), 1 - x)
    part = jnp.where(jr.bernoulli(jr.fold_in(key, 1), share, one), part, 1.0)
    return part * images + (1 - part) * images[::-1]


def measure(c: Config, m: Model, score: str, scope: str, seed: int) -> dict[str, Any]:
    """One run."""
    x = jnp.asarray(m.train.images[:1])
    cost = lambda m: trace(m.fn, m.params, x).costs.flops
    small, before, epochs = m, 0.0, [c.round_epochs] * (c.rounds - 1)
    epochs.append(c.epochs - sum(epochs))
    widths: list[int] = []
    spent = {"select": 0.0, "train": 0.0, "core": 0.0}
    for n in range(c.rounds):
        began = time.perf_counter()
        at_most = cost(m) * c.budget ** ((n + 1) / c.rounds)
        chosen = shrink(c, small, score, scope, seed, at_most)
        small = smaller(small, chosen)
        widths = [int(mask.sum()) for mask in chosen.keep.values()]
        before = accuracy(small.fn, small.params, m.test, 500)
        searched, busy = time.perf_counter(), time.process_time()
        small = finetune(c, m, small, epochs[n], seed + 1000 * n)
        spent["select"] += searched - began
        spent["train"] += time.perf_counter() - searched
        spent["core"] += time.process_time() - busy
    after = accuracy(small.fn, small.params, m.test, 500)
    return {
        "score": score,
        "scope": scope,
        "only": c.only,
        "seed": seed,
        "epochs": c.epochs,
        "flops": cost(small) / cost(m),
        "before": before,
        "after": after,
        "widths": widths,
        "select_seconds": spent["select"],
        "train_seconds": spent["train"],
        # What it takes on cores of its own, whoever else uses them.
        "train_core_seconds": spent["core"],
    }


def run(c: Config) -> None:
    """Every row that is not there yet; then the table."""
    for name in ("mixup", "plain"):
        if not 0 <= (value := getattr(c, name)) <= 1:
            raise ValueError(f"--{name} is a share, in [0, 1], got {value}.")
    if c.rounds < 1 or c.round_epochs * (c.rounds - 1) > c.epochs:
        raise ValueError(
            f"{c.rounds} rounds of {c.round_epochs:g} epochs each but the last do not "
            f"fit in {c.epochs:g} epochs: give --epochs more."
        )
    m = read(c)
    options = {
        "budget": c.budget,
        "rounds": c.rounds,
        "round_epochs": c.round_epochs,
        "multiple": c.multiple,
        "batch_size": c.batch_size,
        "learning_rate": c.learning_rate,
        "weight_decay": c.weight_decay,
        "temperature": c.temperature,
        "mixup": c.mixup,
        "plain": c.plain,
    }
    rows = rows_so_far(c.output, options)
    done = {
        tuple(r[k] for k in ("score", "scope", "only", "epochs", "seed")) for r in rows
    }
    dense = accuracy(m.fn, m.params, m.test, 500)
    for seed in range(c.seeds):
        for score in c.scores or SCORES:
            for scope in c.scopes:
                if (score, scope, c.only, c.epochs, seed) in done:
                    continue
                print(f"{score}, {scope}, seed {seed}", flush=True)
                rows.append(measure(c, m, score, scope, seed))
                found = {"options": options, "dense": dense, "rows": rows}
                write_json(c.output, about() | found)
    print(f"dense: {dense:.2%}")
    for line in summary(rows):
        print(line)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kind of row: means over the seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in rows:
        kind = r["score"], r["scope"], r["only"], r["epochs"]
        groups.setdefault(kind, []).append(r)
    mean = lambda name, same: statistics.mean(r[name] for r in same)
    lines = []
    for (score, scope, only, epochs), same in groups.items():
        lines.append(
            f"{score:17} {scope:7} {only:18} {epochs:4g} epochs  {len(same)} seeds  "
            f"FLOPs {mean('flops', same):.1%}  before {mean('before', same):7.2%}  "
            f"after {mean('after', same):7.2%}"
        )
    return lines


if __name__ == "__main__":
    main(run, Config, description=__doc__)
