"""How long it takes to trace and analyse a model that is given as shapes.

    python scripts/bench/analysis.py --output benchmarks/analysis.json

A LLaMA of 7 billion parameters, written as a Python loop over its layers and as a
scan; the loop also with fewer and more layers, to see how the time grows. Nothing is
allocated. Each figure is the median of a few runs.
"""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.models import Llama, LLAMA_7B
from jaxeff.program import trace
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time to trace and analyse a model that is given as shapes."""

    layers: tuple[int, ...] = (2, 8, 32, 64)
    """Layers of the LLaMA that is written as a loop."""
    repeats: int = 3
    """Runs of each; the median counts."""
    output: Path | None = None
    """File for the results, as JSON."""


def analyse(layers: int, scan: bool) -> dict[str, Any]:
    """One model, and the seconds each look at it takes."""
    model = Llama(dataclasses.replace(LLAMA_7B, n_layers=layers), scan=scan)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        jax.clear_caches()  # or a second run would find the first one's traces
        began = time.perf_counter()
        found = call()
        seconds[name] = time.perf_counter() - began
        return found

    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    program = timed("trace", lambda: trace(model.apply, params, tokens))
    timed("sites", lambda: program.sites)
    couplings = timed("couplings", lambda: program.couplings)
    timed("costs", lambda: program.costs)
    return {
        "layers": layers,
        "scan": scan,
        "parameters": sum(x.size for x in program.shapes.values()),
        "couplings": len(couplings),
        "free": len(couplings.free),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
    }


def run(config: Config) -> None:
    """Measures, prints, writes."""
    rows = []
    cases = [*((n, False) for n in config.layers), (LLAMA_7B.n_layers, True)]
    for layers, scan in cases:
        runs = [analyse(layers, scan) for _ in range(config.repeats)]
        median = statistics.median(r["total_seconds"] for r in runs)
        row = min(runs, key=lambda r: abs(r["total_seconds"] - median))
        rows.append(row)
        form = "scan" if scan else "loop"
        print(
            f"{form} of {layers:3} layers, {row['parameters'] / 1e9:6.2f} billion "
            f"parameters: {row['total_seconds']:.2f} s "
            f"({row['free']} of {row['couplings']} couplings free)"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 2**30:.2f} GiB")
    if config.output is not None:
        write_json(config.output, {**about(), "rows": rows, "peak_bytes": peak})


if __name__ == "__main__":
    main(run, Config)
