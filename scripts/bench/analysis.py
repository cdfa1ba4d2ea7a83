"""How long it takes to trace and analyse a model that is given as shapes.

    python scripts/bench/analysis.py --output benchmarks/analysis.json

LLaMAs of 7 and 70 billion parameters, written as a Python loop over their layers and
as a scan; the loop of the smaller one also with 2 to 256 layers, to see how the time
grows: about the same seconds for each layer. Nothing is allocated. Each figure is the
median of a few runs; the peak of memory is that of the whole process so far, so the
largest models come last.
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

from jaxeff.models import Llama, LLAMA_7B, LLAMA_70B, LlamaConfig
from jaxeff.program import trace
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time to trace and analyse a model that is given as shapes."""

    layers: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    """Layers of the LLaMA of 7 billion parameters that is written as a loop."""
    repeats: int = 3
    """Runs of each; the median counts. Of more than 64 layers one runs."""
    output: Path | None = None
    """File for the results, as JSON."""


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def analyse(config: LlamaConfig, scan: bool) -> dict[str, Any]:
    """One model, and the seconds each look at it takes."""
    model = Llama(config, scan=scan)
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
        "layers": config.n_layers,
        "scan": scan,
        "parameters": sum(x.size for x in program.shapes.values()),
        "couplings": len(couplings),
        "free": len(couplings.free),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "seconds_per_layer": sum(seconds.values()) / config.n_layers,
        "peak_bytes": peak_bytes(),
    }


def run(config: Config) -> None:
    """Measures, prints, writes."""
    rows = []
    sizes = [dataclasses.replace(LLAMA_7B, n_layers=n) for n in config.layers]
    cases = [(LLAMA_7B, True), *((size, False) for size in sizes)]
    cases += [(LLAMA_70B, True), (LLAMA_70B, False)]
    for size, scan in cases:
        repeats = config.repeats if scan or size.n_layers <= 64 else 1
        runs = [analyse(size, scan) for _ in range(repeats)]
        median = statistics.median(r["total_seconds"] for r in runs)
        row = min(runs, key=lambda r: abs(r["total_seconds"] - median))
        rows.append(row)
        form = "scan" if scan else "loop"
        print(
            f"{form} of {size.n_layers:3} layers, "
            f"{row['parameters'] / 1e9:6.2f} billion parameters: "
            f"{row['total_seconds']:.2f} s, {row['seconds_per_layer']:.3f} per layer "
            f"({row['free']} of {row['couplings']} couplings free), "
            f"peak memory {row['peak_bytes'] / 2**30:.2f} GiB"
        )
    if config.output is not None:
        write_json(config.output, {**about(), "rows": rows})


if __name__ == "__main__":
    main(run, Config)
