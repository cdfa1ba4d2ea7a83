"""Does a model train as well when no worker waits for another?

    python scripts/bench/asynchronous.py --data-dir DIR

Trains MobileNet on Fashion-MNIST step by step, and with the same number of batches by
workers on Ray, of which one is killed after a third of the run and one more comes after
half of it; measures both on the 10,000 test images. Each finished row is in `--output`.
Exits 1 where a batch was lost or counted twice, or where the asynchronous run is worse
by more than a point.
"""

import collections
import dataclasses
import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import optax

from jaxeff import data, models
from jaxeff.program import table
from jaxeff.training import (
    accuracy,
    classification_loss,
    fit,
    forms,
    init_state,
    make_train_step,
)
from jaxeff.training.asynchronous import Asynchronous, Problem
from jaxeff.training.cli import main
from jaxeff.training.results import about, rows_so_far, write_json
from scripts.bench.subjects import cosine

TRAINABLE = "params/**"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    data_dir: Path
    """Folder with Fashion-MNIST."""
    workers: int = 4
    """To begin with."""
    steps: int = 1500
    """Batches of each run."""
    batch_size: int = 64
    """Images of a batch."""
    learning_rate: float = 1e-3
    """Of AdamW, at its peak; a cosine takes it to zero."""
    staleness: int = 8
    """The most updates that a gradient may be behind."""
    compensation: float = 0.04
    """Of the delay."""
    output: Path = Path("benchmarks/asynchronous.json")
    """JSON file for the results, and to go on from."""


def problem(c: Config) -> Problem:
    """The same in every process."""
    train, _ = data.load("fashion_mnist", c.data_dir)
    model = models.build("mobilenet")
    params = jax.jit(model.init)(jr.key(0), train.images[:1])
    return Problem(
        loss=classification_loss(forms(model, params)[1]),
        tx=optax.adamw(cosine(c.learning_rate, c.steps)),
        params=params,
        batch=lambda n: next(data.batches(train, c.batch_size, start_step=n)),
        key=jr.key(1),
        trainable=TRAINABLE,
    )


def step_by_step(c: Config) -> tuple[Any, dict[str, Any]]:
    """The weights of the synchronous run."""
    p = problem(c)
    state = init_state(p.params, p.tx, p.key, trainable=TRAINABLE)
    step = make_train_step(p.loss, p.tx, trainable=TRAINABLE)
    batches = (p.batch(n) for n in range(c.steps))
    return fit(step, state, data.prefetch(batches), steps=c.steps).params, {}


def on_workers(c: Config) -> tuple[Any, dict[str, Any]]:
    """The weights of the asynchronous run, and what its record says."""
    happened: dict[str, int] = {}

    def look(run: Asynchronous, n: int) -> None:
        if "killed" not in happened and n >= c.steps // 3:
            os.kill(run.pids()["worker 0"], signal.SIGKILL)
            happened["killed"] = n
        if "joined" not in happened and n >= c.steps // 2:
            run.add_worker()
            happened["joined"] = n

    run = Asynchronous(
        functools.partial(problem, c),
        steps=c.steps,
        workers=c.workers,
        staleness=c.staleness,
        compensation=c.compensation,
        restarts=0,
    )
    state = run.wait(on_look=look)
    counts = collections.Counter(a.batch for a in run.log)
    stale = sorted(a.staleness for a in run.log)
    return state.params, happened | {
        "lost": c.steps - len(counts),
        "twice": sum(n > 1 for n in counts.values()),
        "staleness": stale[len(stale) // 2],
        "most_stale": stale[-1],
        "by_worker": dict(collections.Counter(a.worker for a in run.log)),
    }


WAYS = {"synchronous": step_by_step, "asynchronous": on_workers}


def run(c: Config) -> None:
    """Both ways, if they are not there yet; then the table."""
    options = {k: v for k, v in vars(c).items() if k not in ("data_dir", "output")}
    rows = rows_so_far(c.output, options)
    done = {r["way"] for r in rows}
    _, test = data.load("fashion_mnist", c.data_dir)
    for way, train in WAYS.items():
        if way in done:
            continue
        print(way, flush=True)
        began = time.perf_counter()
        params, found = train(c)
        seconds = time.perf_counter() - began
        fn = forms(models.build("mobilenet"), params)[0]
        row = {"way": way, "accuracy": accuracy(fn, params, test, 500)}
        rows.append(row | {"seconds": seconds} | found)
        write_json(c.output, about() | {"options": options, "rows": rows})
    lines = [
        (r["way"], f"{r['accuracy']:.2%}", f"{r['seconds']:.0f} s")
        + tuple(str(r.get(k, "")) for k in ("lost", "twice", "staleness", "most_stale"))
        for r in rows
    ]
    head = ("way", "accuracy", "", "lost", "twice", "median staleness", "most")
    print(table(head, lines))
    sys.exit(wrong(*rows))


def wrong(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What is, in the asynchronous run after the other."""
    if after["lost"] or after["twice"]:
        return "a batch was lost or counted twice"
    if after["accuracy"] < before["accuracy"] - 0.01:
        return "the asynchronous run is worse by more than a point"
    return None


if __name__ == "__main__":
    main(run, Config, description=__doc__)
