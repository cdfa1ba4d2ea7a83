"""Do fewer channels mean less time? Shrunk models against dense ones, in turns.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python scripts/bench/shrink_speed.py

Half of every coupling's indices leave ResNet-18 (224 x 224) and a BERT of six layers
(128 tokens); dense and shrunk take turns on a batch, both as written and with their
convolutions tuned. Prints by how much FLOPs and time fall. Exits 1 where a shrunk model
does not compute what the dense one with zeros computes, or where it is less than 0.75
times as much faster as it has fewer FLOPs, each of the two at its fastest.

The variable before the command gives large arrays large pages, which Linux fills
faster; the logits of this BERT are 125 MB. The same without it is in
`benchmarks/shrink_speed_small_pages.json`.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from jaxeff.cost import measure_latency, tune_convolutions
from jaxeff.models import build
from jaxeff.program import trace
from jaxeff.pruning import select
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json
from jaxeff.tree import tree_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what it takes: images of that shape, or that many tokens."""

    model: str
    options: dict[str, Any]
    image: tuple[int, ...] = ()
    tokens: int = 0
    tune: bool = False  # it has convolutions


CASES = (
    Case(model="resnet18", options={"classes": 1000}, image=(224, 224, 3), tune=True),
    Case(
        model="bert",
        options={"vocab_size": 30522, "d_model": 768, "n_layers": 6, "n_heads": 12},
        tokens=128,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    batch_size: int = 8
    """Examples in a call."""
    keep: float = 0.5
    """Fraction of each coupling's indices that stays."""
    repeats: int = 30
    """Timed calls of each."""
    max_seconds: float = 120.0
    """For one model, once each was timed three times."""
    share: float = 0.75
    """The speed-up passes from this share of the FLOP reduction on."""
    output: Path = Path("benchmarks/shrink_speed.json")
    """JSON file for the results."""


def run(c: Config) -> None:
    """Measures every case, prints and writes the results."""
    rows = []
    for case in CASES:
        row = measure(c, case)
        rows.append(row)
        for name, (_, median, _) in row["seconds"].items():
            print(f"{row['model']:10} {name:14} {1e3 * median:6.1f} ms")
        print(
            f"{row['model']:10} FLOPs / {row['flops_ratio']:.2f}  "
            f"time / {row['speed_up']:.2f} ({row['share']:.0%} of it), "
            f"same function: {row['same']}",
            flush=True,
        )
    write_json(c.output, about() | {"keep": c.keep, "rows": rows})
    good = all(r["same"] and r["share"] >= c.share for r in rows)
    sys.exit(0 if good else 1)


def measure(c: Config, case: Case) -> dict[str, Any]:
    """One model, dense and shrunk."""
    model = build(case.model, **case.options)
    key = jr.key(0)
    if case.tokens:
        size = (c.batch_size, case.tokens)
        x = jr.randint(key, size, 0, case.options["vocab_size"])
    else:
        x = jr.normal(key, (c.batch_size, *case.image))
    params = jax.jit(model.init)(key, x)
    chosen = select(model.apply, params, x[:1], keep=c.keep)
    fn, small = chosen.resize(model.apply), chosen.take(params)
    dense, shrunk = jax.jit(model.apply), jax.jit(fn)
    want, got = dense(chosen.zeroed(params), x), shrunk(small, x)
    same = _same(got, want)
    functions = {"dense": (dense, params), "small": (shrunk, small)}
    measured = {}
    if case.tune:
        for name, (f, p) in list(functions.items()):
            tuned = tune_convolutions(f, p, x)
            functions[f"{name}, tuned"] = jax.jit(tuned), p
            same = same and _same(functions[f"{name}, tuned"][0](p, x), f(p, x))
            measured[name] = [dataclasses.asdict(m) for m in tuned.measured]
            print(tuned)
    thunks = {name: functools.partial(f, p, x) for name, (f, p) in functions.items()}
    times = measure_latency(thunks, repeats=c.repeats, max_seconds=c.max_seconds)
    best = {
        name: min(t.median for n, t in times.items() if n.startswith(name))
        for name in ("dense", "small")
    }
    flops = [
        trace(f, p, x).costs.flops for f, p in ((model.apply, params), (fn, small))
    ]
    return {
        "model": case.model,
        "options": case.options,
        "batch_size": c.batch_size,
        "same": same,
        "parameters": [tree_size(params), tree_size(small)],
        "flops": flops,
        "seconds": {n: [t.low, t.median, t.high] for n, t in times.items()},
        "tuned": measured,
        "repeats": times["dense"].repeats,
        "flops_ratio": flops[0] / flops[1],
        "speed_up": best["dense"] / best["small"],
        "share": best["dense"] / best["small"] / (flops[0] / flops[1]),
    }


def _same(got: Any, want: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(_close, got, want)))


def _close(a: jax.Array, b: jax.Array) -> bool:
    scale = max(float(jnp.abs(b).max()), 1e-3)
    return float(jnp.abs(a - b).max()) <= 1e-3 * scale


if __name__ == "__main__":
    main(run, Config, description=__doc__)
