"""`lift`: free without compressed weights, and what compressed weights cost with it.

    python scripts/bench/lift.py

Without compressed weights `jit(lift(fn))` must be the same program as `jit(fn)`; its
lowered form is compared, and both are timed in turns. With compressed weights the
same model is timed dense, with int8 weights alone, with int8 weights and activations
(w8a8) and with int4 weights, on one example and on many, and each is compared with
the dense model on the weights it stands for. Exits 1 where the programs differ, or a
compressed model computes something else.

On two CPU cores, in five minutes: without compressed weights 0.997 to 1.008 of the time
of the plain function; with them w8a8 took 0.60 to 0.85 of the dense time for the
transformers and the MLP on a batch, but 3 to 4 times as long for ResNet-20, whose
integer convolutions the CPU lacks; int8 and int4 weights alone saved bytes, not time
(1.0 to 2.9 of the dense time).
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jaxeff import lift
from jaxeff.cost import measure_latency
from jaxeff.models import build
from jaxeff.program import dense, lift_report
from jaxeff.quantization import Format, int4, int8, quantize, w8a8
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json
from jaxeff.tree import tree_bytes

FORMATS: dict[str, Format] = {"int8": int8, "w8a8": w8a8, "int4": int4}
# How far a format's own rounding may take the outputs, of their norm. Weights alone:
# only the order of float32 sums differs. w8a8 also rounds what enters each product.
TOLERANCE = {"int8": 1e-4, "w8a8": 0.1, "int4": 1e-4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model and one example of what it takes."""

    model: str
    options: dict[str, Any]
    example: tuple[int, ...]  # shape, without the batch
    tokens: bool = False
    many: int = 32  # examples in a large batch


TEXT = {"vocab_size": 4096, "d_model": 512, "n_layers": 4, "n_heads": 8}
CASES = (
    Case(model="mlp", options={"features": (2048, 2048)}, example=(32, 32, 3)),
    Case(model="cnn", options={}, example=(32, 32, 3)),
    Case(model="resnet20", options={}, example=(32, 32, 3)),
    Case(model="gpt", options=TEXT, example=(64,), tokens=True, many=8),
    Case(
        model="llama",
        options={**TEXT, "hidden": 1408, "scan": True},
        example=(64,),
        tokens=True,
        many=8,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    repeats: int = 300
    """Timed calls of each candidate."""
    max_seconds: float = 20.0
    """For one comparison, once each candidate was timed three times."""
    output: Path = Path("benchmarks/lift.json")
    """JSON file for the results."""


def run(c: Config) -> None:
    """Measures every case, prints and writes the results."""
    cases = [measure(case, c.repeats, c.max_seconds) for case in CASES]
    write_json(c.output, about() | {"tolerance": TOLERANCE, "cases": cases})
    wrong = [r["model"] for r in cases if not r["right"]]
    print(f"{c.output}: {len(cases)} models" + f"; wrong: {wrong}" * bool(wrong))
    sys.exit(1 if wrong else 0)


def measure(case: Case, repeats: int, max_seconds: float) -> dict[str, Any]:
    """The two comparisons for one model; `right` tells whether it computes right."""
    model = build(case.model, **case.options)
    x = {n: example(case, n) for n in (1, case.many)}
    params = jax.jit(model.init)(jr.key(0), x[1])
    timing = {"repeats": repeats, "max_seconds": max_seconds}
    # Programs that are the same differ by less than noise: that takes many turns.
    many_turns = {**timing, "repeats": 5 * repeats}
    without = without_leaves(model.apply, params, x[case.many], **many_turns)
    print(
        f"{case.model:9} lift without leaves: "
        f"{'the same program' if without['same_program'] else 'ANOTHER PROGRAM'}, "
        f"x {without['ratio']:.4f}"
    )
    variants = {"dense": (model.apply, params)} | {
        name: quantize(model.apply, params, x[1], formats={"**": f})
        for name, f in FORMATS.items()
    }
    found = {n: with_leaves(variants, xn, **timing) for n, xn in x.items()}
    for n, rows in found.items():
        for name, row in rows.items():
            print(
                f"{case.model:9} batch {n:3} {name:5} {1e3 * row['seconds']:9.3f} ms"
                f"  x {row['ratio']:.3f}  {row['bytes'] / 1e6:7.2f} MB"
                f"  error {row['error']:.1e}"
            )
    errors = [
        row["error"] <= TOLERANCE[name]
        for rows in found.values()
        for name, row in rows.items()
        if name in TOLERANCE
    ]
    return {
        **dataclasses.asdict(case),
        "without_leaves": without,
        "with_leaves": {f"batch {n}": rows for n, rows in found.items()},
        "on_dense": on_dense(variants, x[1]),
        "right": without["same_program"] and all(errors),
    }


def example(case: Case, batch: int) -> jax.Array:
    """Random images or tokens."""
    shape = (batch, *case.example)
    if case.tokens:
        return jr.randint(jr.key(1), shape, 0, case.options["vocab_size"])
    return jr.normal(jr.key(1), shape)


def without_leaves(
    fn: Callable, params: Any, x: jax.Array, **timing: Any
) -> dict[str, Any]:
    """`jit(fn)` against `jit(lift(fn))` on the same plain weights."""
    candidates = {"plain": jax.jit(fn), "lifted": jax.jit(lift(fn))}
    programs = {
        # The module is named after the Python function; nothing else may differ.
        re.sub(r"module @\S+", "module", f.lower(params, x).as_text())
        for f in candidates.values()
    }
    seconds = in_turns(
        [lambda f=f: f(params, x) for f in candidates.values()], **timing
    )
    # Of each turn by itself: a machine that is busy for a while slows both.
    ratios = seconds[:, 1] / seconds[:, 0]
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "same_program": len(programs) == 1,
        "seconds": dict(zip(candidates, np.median(seconds, 0).tolist(), strict=True)),
        "ratio": ratio,
        "quartiles": [low, high],
        "turns": len(seconds),
    }


def in_turns(
    thunks: Sequence[Callable], *, repeats: int, max_seconds: float
) -> np.ndarray:
    """Seconds of each call: a row per turn, a column per thunk."""
    for thunk in thunks:
        jax.block_until_ready(thunk())  # compiles
    seconds = np.zeros((repeats, len(thunks)))
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > max_seconds:
            return seconds[:turn]
        for i in range(len(thunks)):
            i = (i + turn) % len(thunks)  # another one begins each time
            before = time.perf_counter()
            jax.block_until_ready(thunks[i]())
            seconds[turn, i] = time.perf_counter() - before
    return seconds


def with_leaves(
    variants: Mapping[str, tuple[Callable, Any]], x: jax.Array, **timing: Any
) -> dict[str, dict[str, Any]]:
    """Time, size and error of each variant; the first is what the others are to."""
    thunks, errors = {}, {}
    for name, (fn, params) in variants.items():
        compiled = jax.jit(fn)
        thunks[name] = lambda f=compiled, p=params: f(p, x)
        y, exact = compiled(params, x), compiled(dense(params), x)
        errors[name] = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    times = measure_latency(thunks, **timing)
    first = next(iter(times.values())).median
    return {
        name: {
            "seconds": t.median,
            "quartiles": [t.low, t.high],
            "ratio": t.median / first,
            "bytes": tree_bytes(variants[name][1]),
            "error": errors[name],
        }
        for name, t in times.items()
    }


def on_dense(
    variants: Mapping[str, tuple[Callable, Any]], x: jax.Array
) -> dict[str, list[str]]:
    """For each variant, the uses of a weight that ran on its dense array."""
    return {
        name: sorted(
            f"{use.path} in {use.primitive}"
            for use in lift_report(fn, params, x)
            if not use.native
        )
        for name, (fn, params) in variants.items()
        if name in FORMATS
    }


if __name__ == "__main__":
    main(run, Config, description=__doc__)
