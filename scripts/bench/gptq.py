"""How long GPTQ takes on one matrix, how long to compile, and what it gains.

    PYTHONPATH=. python scripts/bench/gptq.py

A layer of 1024 x 1024 weights in 4 bits, groups of 128, fitted to 4096 inputs that
correlate; and the compilation for more columns, whose number of equations does not
grow. GPTQ and rounding to the nearest run in turns.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.quantization import int4, scales
from jaxeff.quantization.gptq import gptq_groups, gptq_matrix
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    size: int = 1024
    """Rows and columns of the layer."""
    inputs: int = 4096
    """That it is fitted to."""
    group: int = 128
    """Weights that share a scale."""
    columns: tuple[int, ...] = (1024, 2048, 4096)
    """To compile for, with 1024 rows."""
    repeats: int = 10
    """Runs of each."""
    output: Path = Path("benchmarks/gptq.json")
    """JSON file for the results."""


def run(c: Config) -> None:
    """Measures, prints and writes everything."""
    rng = np.random.default_rng(0)
    # A spectrum that falls off, as those of activations do.
    mix = rng.normal(size=(c.size, c.size)) * np.exp(-np.arange(c.size) / 100)[:, None]
    x = jnp.asarray(rng.normal(size=(c.inputs, c.size)) @ mix / 30, jnp.float32)
    w = jnp.asarray(rng.normal(size=(c.size, c.size)), jnp.float32)
    h, fmt = x.T @ x, int4.grouped(c.group)
    shared = (1, c.group)

    @jax.jit
    def nearest(w, h):
        return scales.apply(w, scales.fit(w, fmt, shared), fmt.grid)

    def ordered(w, h):
        scale = jnp.repeat(scales.fit(w, fmt, shared).scale, c.group, 1)
        return gptq_matrix(w, h, scale, None, grid=fmt.grid)

    methods: dict[str, Callable] = {
        "nearest": nearest,
        "GPTQ, activation order": jax.jit(ordered),
        "GPTQ, groups on the way": lambda w, h: gptq_groups(w, h, format=fmt)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors = {}
    size = float(jnp.linalg.norm(x @ w.T))
    for name, method in methods.items():
        new = jax.block_until_ready(method(w, h))
        errors[name] = float(jnp.linalg.norm(x @ (new - w).T)) / size
    for _ in range(c.repeats):
        for name, method in methods.items():
            begin = time.perf_counter()
            jax.block_until_ready(method(w, h))
            seconds[name].append(time.perf_counter() - begin)
    found: dict[str, Any] = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "error": errors[name],
            "of nearest": errors[name] / errors["nearest"],
        }
        for name in methods
    }
    for name, row in found.items():
        print(
            f"{name:24} {row['seconds'] * 1e3:7.1f} ms  error {row['error']:.4f}  "
            f"{row['of nearest']:.2f} of the nearest"
        )
    compiled = {}
    for n in c.columns:
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, n), (n, n))]
        one = lambda w, h: gptq_matrix(w, h, jnp.ones_like(w), None, grid=fmt.grid)
        begin = time.perf_counter()
        jax.jit(one).lower(*shapes).compile()
        compiled[n] = time.perf_counter() - begin
        print(f"{n} columns: compiled in {compiled[n]:.2f} s")
    options = {k: str(v) for k, v in dataclasses.asdict(c).items() if k != "output"}
    rows = {"options": options, "methods": found, "compile_seconds": compiled}
    write_json(c.output, about() | rows)


if __name__ == "__main__":
    main(run, Config, description=__doc__)
