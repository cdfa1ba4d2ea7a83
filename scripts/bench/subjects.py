"""Trained models and their data, that several benchmarks compress.

stories260k, a language model of 260 thousand weights, on text of its own and
on Tiny Shakespeare; ResNet-20 on CIFAR-10.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.data import cifar10, Dataset, text
from jaxeff.models import (
    BOS,
    init_cache,
    load_resnet20,
    load_stories260k,
    Tokenizer,
)
from jaxeff.training.language import nats

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the trained ResNet


class Pictures(NamedTuple):
    """The trained ResNet-20 and CIFAR-10."""

    model: Any
    params: Any
    train: Dataset
    test: Dataset

    def batches(self, n: int, batch: int) -> list[tuple]:
        """The first training images, to calibrate with."""
        x = self.train.images
        return [(jnp.asarray(x[i : i + batch]),) for i in range(0, n, batch)]


def resnet20(data: Path) -> Pictures:
    """Reads it from a folder that holds resnet20_cifar10 and cifar10."""
    model, params = load_resnet20(data / "resnet20_cifar10" / "resnet20.safetensors")
    return Pictures(model, params, *cifar10(data / "cifar10", mean=MEAN, std=STD))


def cosine(peak: float, steps: int) -> optax.Schedule:
    """A learning rate that rises for a twentieth of the steps, and falls to zero."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, max(1, steps // 20), max(2, steps)
    )


class Stories(NamedTuple):
    """The language model, and windows of tokens.

    Of each text those to calibrate with, those to measure with, and those to train on.
    """

    model: Any
    params: Any
    texts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def stories(data: Path, n: int, length: int, more: int = 0) -> Stories:
    """Reads it from a folder that holds stories260k and tiny_shakespeare.

    Args:
        data: the folder.
        n: windows of each text, to calibrate with and as many to measure.
        length: of a window, in tokens.
        more: windows to train on.
    """
    folder = data / "stories260k"
    model, params = load_stories260k(folder / "stories260K.bin", scan=True)
    tokenizer = Tokenizer.load(folder / "tok512.bin")
    known, unseen = shakespeare(data, tokenizer, (n + more, n), length)
    play = known[:n], unseen, known[n:]
    draw = lambda count, seed: sample(model, params, count, length, seed)
    own = draw(n, 0), draw(n, 1), draw(more, 2)
    return Stories(model, params, {"own": own, "tiny shakespeare": play})


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


def shakespeare(
    data: Path, tokenizer: Tokenizer, counts: tuple[int, int], length: int
) -> list[np.ndarray]:
    """So many windows of the play, from its first nine tenths and from its last."""
    parts, both = [], text(data / "tiny_shakespeare" / "input.txt.gz")
    for n, part in zip(counts, both, strict=True):
        need, tokens = n * (length + 1), [BOS]
        # Line by line, since encoding takes time quadratic in the length.
        for line in bytes(part).decode(errors="replace").splitlines(keepends=True):
            tokens += tokenizer.encode(line, bos=False)
            if len(tokens) >= need:
                break
        if len(tokens) < need:
            raise ValueError(
                f"{n} sequences of {length + 1} tokens are {need}, but a "
                f"part of the text has {len(tokens)}: take fewer or shorter ones."
            )
        parts.append(np.asarray(tokens[:need]).reshape(n, -1))
    return parts


def perplexity(fn: Callable, params: Any, tokens: np.ndarray, batch: int) -> float:
    """exp of the mean cross-entropy of every token but the first of each sequence."""
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    total = sum(float(_sum_nats(fn, params, jnp.asarray(part))) for part in parts)
    return float(np.exp(total / tokens[:, 1:].size))


@functools.partial(jax.jit, static_argnums=0)
def _sum_nats(fn: Callable, params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.sum(nats(fn(params, tokens[:, :-1]), tokens[:, 1:]))
