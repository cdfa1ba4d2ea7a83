"""Formats and algorithms of quantization side by side, on trained models.

    PYTHONPATH=. python scripts/bench/quantization.py --data DIR

ResNet-20 by accuracy on all 10,000 CIFAR-10 test images, every kernel in the format;
a language model of 260 thousand weights by perplexity, on text it wrote itself
(sampled with other seeds than the text it was calibrated with) and on Tiny
Shakespeare, which it never saw. Calibrated with training images and text; nothing is
trained but the rows called QAT: distilled from the float32 model on the 20,000
training images, or on more text of the same kind. Each finished row is in `--output`,
and a second run goes on from there.

DIR holds stories260k, tiny_shakespeare, resnet20_cifar10 and cifar10.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from rich.progress import track

from jaxeff import data, quantization as q, tree
from jaxeff.distillation import distill_loss, response_loss, taught
from jaxeff.models import init_cache
from jaxeff.parallelism import batch_sharding, make_mesh, replicate
from jaxeff.program import like
from jaxeff.quantization import Codebook, Format, Linear
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
from scripts.bench.subjects import perplexity, Pictures, resnet20, stories

NEAREST: dict[str, Callable] = {
    "nearest": q.quantize,
    "least error": functools.partial(q.quantize, fit="mse"),
    "least output error": functools.partial(q.quantize, fit="output"),
}
FITTED: dict[str, Callable] = {"GPTQ": q.gptq, "AdaRound": q.adaround}
OTHERS: dict[str, Callable] = {
    "HQQ": functools.partial(q.quantize, fit="hqq"),
    "AWQ": q.awq,
    "GPTQ, drift": functools.partial(q.gptq, drift=True),
}


def first(change: Callable) -> Callable:
    """Rounding to the nearest, after a change that leaves the function as it is."""

    def run(fn, params, *args, formats, batches):
        fn, new = change(fn, params, *args, batches)
        return q.quantize(fn, new, *args, formats=formats, batches=batches)

    return run


MOVED: dict[str, Callable] = {
    "SmoothQuant": first(lambda *given: q.smooth(*given[:-1], batches=given[-1])),
    "rotated": first(lambda *given: q.rotate(*given[:-1])),
}
wide2 = Format(Linear(2, narrow=False))
uint3 = Format(Linear(3, symmetric=False))
STATIC = "mse"  # how the range of activations is found

# By format, the algorithms that it is measured with.
PICTURES: dict[Any, tuple[str, ...]] = {
    q.int8: ("nearest",),
    q.w8a8: ("nearest",),
    q.int8.with_activations("int8", range=STATIC): ("nearest",),
    q.fp8: ("nearest",),
    q.w8a8_fp8: ("nearest",),
    Format(Linear(6)): ("nearest",),
    q.int4: (*NEAREST, *FITTED),
    q.uint4: ("nearest", "GPTQ", "AdaRound"),
    q.int4.per_tensor(): ("nearest", "least error", "GPTQ"),
    q.int4.with_activations("int8", range=STATIC): ("nearest", "GPTQ", "AdaRound"),
    q.log4: ("nearest", "least error", "GPTQ"),
    q.log4_sqrt2: (*NEAREST, *FITTED),
    Codebook(4): ("nearest", "least output error", "GPTQ"),
    Codebook(3): ("nearest", "least output error", "GPTQ"),
    Codebook(6, dim=2): ("nearest", "GPTQ"),
    Codebook(4, dim=2): ("nearest", "GPTQ"),
    q.int3: (*NEAREST, *FITTED),
    uint3: ("nearest", "GPTQ", "AdaRound"),
    wide2: ("nearest", *FITTED),
    q.int2: ("nearest", *FITTED),
}
TRAINED: dict[Any, tuple[str, ...]] = dict.fromkeys(
    [q.int4, q.int3, wide2, q.int2], ("QAT",)
)
GROUP = 32
FEW = (*NEAREST, "AWQ", *FITTED, "GPTQ, drift")
TEXTS: dict[Any, tuple[str, ...]] = {
    q.int8: ("nearest",),
    q.w8a8: ("nearest", *MOVED),
    q.int4.with_activations("int4"): ("nearest", *MOVED),
    q.int4.grouped(GROUP): (*FEW, "QAT"),
    q.uint4.grouped(GROUP): (*FEW, "HQQ"),
    q.uint4.grouped(GROUP // 2): ("nearest", "GPTQ", "GPTQ, drift"),
    q.nf4.grouped(GROUP): ("nearest", "GPTQ"),
    q.mxfp4: ("nearest", "GPTQ"),
    q.nvfp4: ("nearest", "GPTQ"),
    q.int3.grouped(GROUP): (*FEW, "QAT"),
    uint3.grouped(GROUP): (*FEW, "HQQ"),
}
# Of keys and values, read back as they were rounded.
CACHES = (q.int8, q.fp8, q.uint4, q.int4)


def kernels(fmt: Any) -> dict[str, Any]:
    """The format for every kernel of the ResNet.

    The three channels of an image make no vectors of two: they are coded one by one.
    """
    if isinstance(fmt, Codebook) and fmt.dim > 1:
        return {"params/conv1/kernel": Codebook(6), "**/kernel": fmt}
    return {"**/kernel": fmt}


def products(fmt: Any) -> dict[str, Any]:
    """The format for every product of the language model but the tied embedding.

    That stays in 8 bits, as is the custom. The 172 inputs of one kernel are no
    multiple of the group: they are cut in four.
    """
    down = fmt.grouped(43) if fmt.group else fmt
    return {"**/embedding": q.int8, "**/down/kernel": down, "**": fmt}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    data: Path
    """Folder with the four data sets."""
    only: tuple[str, ...] = ()
    """Only these of resnet20, own, tiny shakespeare; all by default."""
    images: int = 1024
    """Training images to calibrate with."""
    sequences: int = 128
    """Of the language model: to calibrate with, and as many to measure."""
    length: int = 256
    """Tokens in each."""
    batch: int = 64
    """Sequences or images at a time."""
    epochs: float = 5
    """Of QAT, over the 20,000 training images."""
    learning_rate: float = 2e-3
    """Of QAT, at its peak."""
    text_sequences: int = 1024
    """For QAT of the language model."""
    text_steps: int = 1500
    """Of QAT of the language model, 16 sequences each."""
    text_learning_rate: float = 1e-3
    """Of QAT of the language model, at its beginning."""
    output: Path = Path("benchmarks/quantization.json")
    """JSON file for the results, and to go on from."""


def run(c: Config) -> None:
    """Every row that is not there yet; then the tables."""
    table = Table(c)
    if table.wants("resnet20"):
        subject = resnet20(c.data)
        fn, params = subject.model.apply, subject.params
        score = lambda fn, p: accuracy(fn, p, subject.test, 500)
        batches = subject.batches(c.images, c.batch)
        more = {"QAT": functools.partial(trained, c, subject)}
        for formats in (PICTURES, TRAINED):
            table.fill("resnet20", fn, params, batches, score, formats, kernels, more)
    if table.wants("own") or table.wants("tiny shakespeare"):
        subject = stories(c.data, c.sequences, c.length, c.text_sequences)
        model, params = subject.model, subject.params
        for name, (known, unseen, more) in subject.texts.items():
            if table.wants(name):
                score = lambda fn, p, x=unseen: perplexity(fn, p, x, c.batch)
                batches = [
                    (jnp.asarray(known[i : i + c.batch, :-1]),)
                    for i in range(0, c.sequences, c.batch)
                ]
                train = {"QAT": functools.partial(trained_text, c, more[:, :-1])}
                fn = model.apply
                table.fill(name, fn, params, batches, score, TEXTS, products, train)
                table.caches(name, model, params, score)
    print("\n".join(table.lines()))


class Table:
    """The rows, in the file that they are in."""

    def __init__(self, c: Config):
        self.c = c
        other = ("data", "only", "output")
        given = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
        self.options = {n: x for n, x in given.items() if n not in other}
        self.rows = rows_so_far(c.output, self.options)

    def wants(self, subject: str) -> bool:
        """Whether that is asked for."""
        return not self.c.only or subject in self.c.only

    def fill(
        self,
        subject: str,
        fn: Callable,
        params: Any,
        batches: list[tuple],
        score: Callable,
        formats: dict[Any, tuple[str, ...]],
        spread: Callable[[Any], dict[str, Any]],
        more: dict[str, Callable],
    ) -> None:
        """Adds the rows of a subject that are missing."""
        known = {(r["subject"], r["format"], r["algorithm"]) for r in self.rows}
        if (subject, "float32", "") not in known:
            self.add(subject, "float32", "", score(fn, params), params, params, 0.0)
        algorithms = {**NEAREST, **FITTED, **OTHERS, **MOVED, **more}
        for fmt, names in formats.items():
            for name in names:
                if (subject, fmt.name, name) in known:
                    continue
                begin = time.perf_counter()
                new_fn, new = algorithms[name](
                    fn, params, *batches[0], formats=spread(fmt), batches=batches
                )
                jax.block_until_ready(new)
                seconds = time.perf_counter() - begin
                value = score(new_fn, new)
                self.add(subject, fmt.name, name, value, params, new, seconds)

    def caches(self, subject: str, model: Any, params: Any, score: Callable) -> None:
        """Adds the rows of keys and values; the bits are those of a cache."""
        known = {(r["subject"], r["format"], r["algorithm"]) for r in self.rows}
        for fmt in CACHES:
            if (subject, fmt.name, "keys and values") in known:
                continue

            def fn(params: Any, tokens: Any, fmt: Format = fmt) -> Any:
                cache = init_cache(model.config, *tokens.shape)
                return model.apply(params, tokens, q.quantize_cache(cache, fmt))[0]

            whole = init_cache(model.config, 1, self.c.length)
            small = q.quantize_cache(whole, fmt)
            begin = time.perf_counter()
            value = score(fn, params)
            seconds = time.perf_counter() - begin
            self.add(subject, fmt.name, "keys and values", value, whole, small, seconds)

    def add(
        self,
        subject: str,
        fmt: str,
        algorithm: str,
        value: float,
        params: Any,
        new: Any,
        seconds: float,
    ) -> None:
        """One row, printed and written."""
        n = sum(x.size for x in jax.tree.leaves(params))
        row = {
            "subject": subject,
            "format": fmt,
            "algorithm": algorithm,
            "score": value,
            "bits": 8 * tree.tree_bytes(new) / n,
            "bytes": tree.tree_bytes(new),
            "seconds": seconds,
            # Rows may be of several runs.
            "where": {k: about()[k] for k in ("date", "devices", "environment")},
        }
        self.rows.append(row)
        write_json(
            self.c.output, about() | {"options": self.options, "rows": self.rows}
        )
        print(_line(row), flush=True)

    def lines(self) -> list[str]:
        """The tables."""
        return [_line(r) for r in self.rows]


def _line(r: dict[str, Any]) -> str:
    score = f"{r['score']:8.2%}" if r["subject"] == "resnet20" else f"{r['score']:8.3f}"
    return (
        f"{r['subject']:17} {r['format']:24} {r['algorithm']:19} {score}  "
        f"{r['bits']:5.2f} bits  {r['bytes']:>9,} bytes  {r['seconds']:6.1f} s"
    )


def trained(
    c: Config,
    subject: Pictures,
    fn: Callable,
    params: Any,
    *args: Any,
    formats: Any,
    batches: list[tuple],
) -> tuple[Callable, Any]:
    """Quantization-aware training: the float32 model is the teacher."""
    fn, train_fn = forms(subject.model, params)
    q_fn, student = q.fake_quantize(fn, params, *args, formats=formats, batches=batches)
    forward = classifier(like(q_fn, train_fn), augment=data.augmentation(subject.train))
    steps = round(c.epochs * data.steps_per_epoch(subject.train, 128))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, max(1, steps // 20), max(2, steps)
    )
    tx, mesh = optax.adamw(rate, weight_decay=1e-4), make_mesh()
    loss = response_loss(forward, fn, temperature=4.0)
    step = make_train_step(loss, tx, trainable="params/**")
    state = init_state(student, tx, jr.key(0), trainable="params/**")
    images = data.prefetch(
        data.batches(subject.train, 128, seed=0), batch_sharding(mesh, 128)
    )
    state = fit(
        taught(step, replicate(params, mesh)),
        replicate(state, mesh),
        images,
        steps=steps,
    )
    return q_fn, q.convert(state.params)


def trained_text(
    c: Config,
    tokens: np.ndarray,
    fn: Callable,
    params: Any,
    *args: Any,
    formats: Any,
    batches: list[tuple],
) -> tuple[Callable, Any]:
    """The same for the language model, on sequences of a text."""
    q_fn, student = q.fake_quantize(fn, params, *args, formats=formats, batches=batches)
    train, frozen = tree.partition(student)
    rate = optax.cosine_decay_schedule(c.text_learning_rate, c.text_steps)
    tx = optax.adam(rate)

    @jax.jit
    def step(train, state, tokens):
        def loss(train):
            logits = q_fn(tree.combine(train, frozen), tokens)
            return distill_loss(logits, fn(params, tokens), temperature=1.0).mean()

        updates, state = tx.update(jax.grad(loss)(train), state, train)
        return optax.apply_updates(train, updates), state

    state, order = tx.init(train), np.random.default_rng(0)
    for _ in track(range(c.text_steps), f"training {c.text_steps} steps"):
        chosen = order.choice(len(tokens), 16, replace=False)
        train, state = step(train, state, jnp.asarray(tokens[chosen]))
    return q_fn, q.convert(tree.combine(train, frozen))


if __name__ == "__main__":
    main(run, Config, description=__doc__)
