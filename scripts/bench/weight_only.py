"""Products with weights in few bits against float32, tuned and not.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    PYTHONPATH=. python scripts/bench/weight_only.py

A block of two products (1024 -> 4096 -> 1024), for one row and for more: with dense
float32 weights, with weights of 8 and 4 bits as `quantize` leaves them, and with the
forms that `tune_products` chose here. All in turns; that they compute the same is
checked first. (On a CPU, memory in large pages is faster for all of them.)
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.cost import measure_latency, tune_products
from jaxeff.program import dense
from jaxeff.quantization import Format, int4, int8, quantize
from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json

FORMATS: tuple[Format, ...] = (int8, int4, int4.grouped(128))
# Of the largest output: other forms sum in another order.
WORST = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    width: int = 1024
    """Inputs and outputs of the block."""
    hidden: int = 4096
    """Between the two products."""
    rows: tuple[int, ...] = (1, 8, 32, 256)
    """Of the input."""
    repeats: int = 51
    """Timed calls of each."""
    output: Path = Path("benchmarks/weight_only.json")
    """JSON file for the results."""


def block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Two products and what lies between."""
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def run(c: Config) -> None:
    """Measures, checks, prints and writes everything."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32)
    params = {"up": draw(c.width, c.hidden), "down": draw(c.hidden, c.width)}
    rows = []
    for fmt in FORMATS:
        for n in c.rows:
            rows.append(measure(c, params, fmt, draw(n, c.width)))
            print(_line(rows[-1]), flush=True)
    options = {k: str(v) for k, v in dataclasses.asdict(c).items() if k != "output"}
    write_json(c.output, about() | {"options": options, "rows": rows})


def measure(
    c: Config, params: dict[str, Any], fmt: Format, x: jax.Array
) -> dict[str, Any]:
    """One format and number of rows."""
    fn, small = quantize(block, params, x, formats=fmt)
    tuned = tune_products(fn, small, x)
    runs = {
        "float32": functools.partial(jax.jit(block), dense(small), x),
        "quantized": functools.partial(jax.jit(fn), small, x),
        "tuned": functools.partial(jax.jit(tuned), small, x),
    }
    want = runs["float32"]()
    far = lambda y: float(jnp.abs(y - want).max() / jnp.abs(want).max())
    off = {name: far(call()) for name, call in runs.items()}
    if max(off.values()) > WORST:
        raise ValueError(f"they compute different things: {off}")
    times = {k: t.median for k, t in measure_latency(runs, repeats=c.repeats).items()}
    return {
        "format": fmt.name,
        "rows": len(x),
        "forms": [m.form for m in tuned.measured],
        "off": off,
        "seconds": times,
    }


def _line(r: dict[str, Any]) -> str:
    t = r["seconds"]
    ms = "  ".join(f"{name} {1e3 * s:6.2f} ms" for name, s in t.items())
    return (
        f"{r['format']:20} {r['rows']:4} rows  {ms}  "
        f"tuned / float32 {t['tuned'] / t['float32']:.2f}  ({', '.join(r['forms'])})"
    )


if __name__ == "__main__":
    main(run, Config, description=__doc__)
