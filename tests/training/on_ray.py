"""A run on Ray, as a program of its own: a worker joins, and all others die or stop.

Prints, as JSON, what the record of its updates says.
"""

import json
import os
import signal
import sys
import time

import jax
import jax.random as jr
import numpy as np

from jaxeff.data import batches, digits
from jaxeff.training.asynchronous import Asynchronous, Problem
from tests.training.small import make_loss, Net, TRAINABLE, TX, variables

STEPS = 80


def problem():
    train, _ = digits()

    def slow(n):
        time.sleep(0.2)  # so that there is time to disturb it
        return next(batches(train, 100, seed=7, start_step=n))

    return Problem(
        make_loss(Net()),
        TX,
        variables(),
        slow,
        jr.key(1),
        TRAINABLE,
    )


def unruly(happened):
    def look(run, n):
        if "killed" not in happened and n >= 10:
            os.kill(run.pids()["worker 0"], signal.SIGKILL)
            happened["killed"] = n
        if "stopped" not in happened and n >= 20:
            os.kill(run.pids()["worker 1"], signal.SIGSTOP)
            happened["stopped"] = n
        if "joined" not in happened and n >= 30:
            happened["joined"] = n
            happened["name"] = run.add_worker()
        if "alone" not in happened and n >= 40:
            os.kill(run.pids()["worker 2"], signal.SIGKILL)
            happened["alone"] = n

    return look


def main(folder):
    happened = {}
    options = {"staleness": 6, "lease": 2, "folder": folder, "checkpoint_every": 20}
    run = Asynchronous(problem, steps=STEPS, workers=3, restarts=0, **options)
    state = run.wait(progress=False, on_look=unruly(happened))
    batches_seen = [a.batch for a in run.log]
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    # It is done: another start finds the end of it.
    again = Asynchronous(problem, steps=STEPS, workers=1, folder=folder)
    same = again.wait(progress=False)
    equal = [
        bool((np.asarray(a) == np.asarray(b)).all())
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(same.params), strict=True
        )
    ]
    # What is wrong with a checkpoint is said.
    try:
        Asynchronous(problem, steps=STEPS + 1, workers=1, folder=folder).wait()
    except ValueError as error:
        wrong = str(error)
    print(
        json.dumps(
            {
                "happened": happened,
                "batches": batches_seen,
                "workers": sorted({a.worker for a in run.log}),
                "staleness": max(a.staleness for a in run.log),
                "step": int(state.step),
                "finite": finite,
                "wrong": wrong,
                "again": [len(again.log), all(jax.tree.leaves(equal))],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
