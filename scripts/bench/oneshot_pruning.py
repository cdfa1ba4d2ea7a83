"""One-shot pruning of trained models: magnitude, Wanda and SparseGPT side by side.

    PYTHONPATH=. python scripts/bench/oneshot_pruning.py --data DIR

A language model of 260 thousand weights (all products but the tied output layer) by
perplexity, on text it wrote itself (sampled at temperature 1, other seeds than the
text it was calibrated with) and on Tiny Shakespeare, which it never saw (calibrated
on the first nine tenths, measured on the last). ResNet-20 by accuracy on all 10,000
CIFAR-10 test images, calibrated with training images. Nothing is trained. Exits 1
where SparseGPT is worse than Wanda, or Wanda than magnitude, on the language model,
or where SparseGPT is not the best on the ResNet.

DIR holds stories260k, tiny_shakespeare, resnet20_cifar10 and cifar10.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import pruning
from jaxeff.training.cli import main
from jaxeff.training.evaluate import accuracy
from jaxeff.training.results import about, write_json
from scripts.bench.subjects import perplexity, resnet20, stories

METHODS: dict[str, Callable] = {
    "magnitude": pruning.prune_magnitude,
    "wanda": pruning.wanda,
    "wanda, by layer": functools.partial(pruning.wanda, compare="layer"),
    "sparsegpt": pruning.sparsegpt,
}
SPARSITIES: tuple[float | str, ...] = (0.5, 0.7, "2:4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    data: Path
    """Folder with the four data sets."""
    sequences: int = 128
    """Of the language model: to calibrate with, and as many to measure."""
    length: int = 256
    """Tokens in each."""
    images: int = 512
    """Training images to calibrate with."""
    batch: int = 64
    """Sequences or images at a time."""
    output: Path = Path("benchmarks/oneshot_pruning.json")
    """JSON file for the results."""


def run(c: Config) -> None:
    """Measures, prints and writes everything."""
    texts = language(c)
    pictures = images(c)
    write_json(
        c.output,
        about()
        | {"sequences": c.sequences, "length": c.length, "images": c.images}
        | {"perplexity": texts, "accuracy": pictures},
    )
    ordered = [
        r["sparsegpt"] <= r["wanda"] <= r["magnitude"]
        for t in texts.values()
        for r in t["rows"].values()
    ]
    best = [max(r, key=r.get) == "sparsegpt" for r in pictures["rows"].values()]
    sys.exit(0 if all(ordered + best) else 1)


def compare(
    fn: Callable, params: Any, batches: list, sparsity: float | str, score: Callable
) -> dict[str, float]:
    """The score of each method, at one sparsity."""
    row = {}
    for name, method in METHODS.items():
        data = {} if name == "magnitude" else {"batches": batches}
        begin = time.perf_counter()
        _, new = method(fn, params, *batches[0], sparsity=sparsity, **data)
        jax.block_until_ready(new)
        seconds = time.perf_counter() - begin
        row[name] = score(fn, new)
        print(f"  {sparsity} {name:16} {row[name]:.4f}  ({seconds:.1f} s)", flush=True)
    return row


# The language model.


def language(c: Config) -> dict[str, dict[str, Any]]:
    """Perplexities by text and sparsity."""
    model, params, texts = stories(c.data, c.sequences, c.length)
    fn, out = model.apply, {}
    for name, (known, unseen, _) in texts.items():
        score = lambda fn, p, unseen=unseen: perplexity(fn, p, unseen, c.batch)
        dense = score(fn, params)
        print(f"{name}: dense {dense:.4f}")
        batches = [
            (jnp.asarray(known[i : i + c.batch, :-1]),)
            for i in range(0, c.sequences, c.batch)
        ]
        rows = {
            str(sparsity): compare(fn, params, batches, sparsity, score)
            for sparsity in SPARSITIES
        }
        out[name] = {"dense": dense, "rows": rows}
    return out


# The ResNet.


def images(c: Config) -> dict[str, Any]:
    """Accuracies by sparsity."""
    subject = resnet20(c.data)
    fn, params = subject.model.apply, subject.params
    batches = subject.batches(c.images, c.batch)
    score = lambda fn, p: accuracy(fn, p, subject.test)
    dense = score(fn, params)
    print(f"resnet20: dense {dense:.4f}")
    rows = {
        str(sparsity): compare(fn, params, batches, sparsity, score)
        for sparsity in SPARSITIES
    }
    return {"dense": dense, "rows": rows}


if __name__ == "__main__":
    main(run, Config, description=__doc__)
