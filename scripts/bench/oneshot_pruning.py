"""One-shot pruning of trained models: magnitude, Wanda and SparseGPT side by side.

    python scripts/bench/oneshot_pruning.py --data DIR

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
import jax.random as jr
import numpy as np

from jaxeff import pruning
from jaxeff.data import cifar10, text
from jaxeff.models import BOS, init_cache, load_resnet20, load_stories260k, Tokenizer
from jaxeff.training.cli import main
from jaxeff.training.evaluate import accuracy
from jaxeff.training.language import nats
from jaxeff.training.results import about, write_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the trained ResNet
METHODS: dict[str, Callable] = {
    "magnitude": pruning.prune_magnitude,
    "wanda": pruning.wanda,
    "wanda, by layer": functools.partial(pruning.wanda, compare="layer"),
    "sparsegpt": pruning.sparsegpt,
}


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
    folder = c.data / "stories260k"
    model, params = load_stories260k(folder / "stories260K.bin", scan=True)
    tokenizer = Tokenizer.load(folder / "tok512.bin")
    play = shakespeare(c, tokenizer)
    own = [sample(model, params, c.sequences, c.length, seed) for seed in (0, 1)]
    fn, out = model.apply, {}
    for name, (known, unseen) in {"own": own, "tiny shakespeare": play}.items():
        score = lambda fn, p, unseen=unseen: perplexity(fn, p, unseen, c.batch)
        dense = score(fn, params)
        print(f"{name}: dense {dense:.4f}")
        batches = [
            (jnp.asarray(known[i : i + c.batch, :-1]),)
            for i in range(0, c.sequences, c.batch)
        ]
        rows = {
            str(sparsity): compare(fn, params, batches, sparsity, score)
            for sparsity in (0.5, 0.7, "2:4")
        }
        out[name] = {"dense": dense, "rows": rows}
    return out


def sample(model: Any, params: Any, n: int, length: int, seed: int) -> np.ndarray:
    """Sequences of length + 1 tokens, drawn from the model, each after BOS."""

    def step(state, key):
        token, cache = state
        logits, cache = model.apply(params, token[:, None], cache)
        new = jr.categorical(key, logits[:, -1])
        return (new, cache), new

    @jax.jit
    def draw(key):
        first = jnp.full(n, BOS)
        cache = init_cache(model.config, n, length)
        _, rest = jax.lax.scan(step, (first, cache), jr.split(key, length))
        return jnp.concatenate([first[:, None], rest.T], axis=1)

    return np.asarray(draw(jr.key(seed)))


def shakespeare(c: Config, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Windows of the play, from its first nine tenths and from its last."""
    parts = []
    for part in text(c.data / "tiny_shakespeare" / "input.txt.gz"):
        need, tokens = c.sequences * (c.length + 1), [BOS]
        # Line by line, since encoding takes time quadratic in the length.
        for line in bytes(part).decode(errors="replace").splitlines(keepends=True):
            tokens += tokenizer.encode(line, bos=False)
            if len(tokens) >= need:
                break
        if len(tokens) < need:
            raise ValueError(
                f"{c.sequences} sequences of {c.length + 1} tokens are {need}, but a "
                f"part of the text has {len(tokens)}: take fewer or shorter ones."
            )
        parts.append(np.asarray(tokens[:need]).reshape(c.sequences, -1))
    return parts


def perplexity(fn: Callable, params: Any, tokens: np.ndarray, batch: int) -> float:
    """exp of the mean cross-entropy of every token but the first of each sequence."""
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    total = sum(float(_sum_nats(fn, params, jnp.asarray(part))) for part in parts)
    return float(np.exp(total / tokens[:, 1:].size))


@functools.partial(jax.jit, static_argnums=0)
def _sum_nats(fn: Callable, params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.sum(nats(fn(params, tokens[:, :-1]), tokens[:, 1:]))


# The ResNet.


def images(c: Config) -> dict[str, Any]:
    """Accuracies by sparsity."""
    path = c.data / "resnet20_cifar10" / "resnet20.safetensors"
    model, params = load_resnet20(path)
    train, test = cifar10(c.data / "cifar10", mean=MEAN, std=STD)
    batches = [
        (jnp.asarray(train.images[i : i + c.batch]),)
        for i in range(0, c.images, c.batch)
    ]
    score = lambda fn, p: accuracy(fn, p, test)
    dense = score(model.apply, params)
    print(f"resnet20: dense {dense:.4f}")
    rows = {
        str(sparsity): compare(model.apply, params, batches, sparsity, score)
        for sparsity in (0.5, 0.7, "2:4")
    }
    return {"dense": dense, "rows": rows}


if __name__ == "__main__":
    main(run, Config, description=__doc__)
