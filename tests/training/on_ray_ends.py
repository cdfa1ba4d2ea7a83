"""How runs on Ray end, as a program of its own; prints as JSON what was seen."""

import json
import time

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.training import Aux
from jaxeff.training.asynchronous import Asynchronous, Problem
from jaxeff.training.ray_cluster import Cluster

STEPS = 6


def problem():
    def batch(n):
        time.sleep(0.3)  # longer than from one look to the next
        return np.full(4, 0.1 * n)

    return Problem(
        lambda params, batch, key: ((params["w"] - batch.mean()) ** 2, Aux()),
        optax.sgd(0.1),
        {"w": jnp.zeros(())},
        batch,
        jr.key(0),
    )


class Waits:
    """Metrics that take so long that all workers end meanwhile."""

    def __init__(self, run):
        self.run = run

    def write(self, n, values):
        import ray

        working = list(self.run._working)
        ray.wait(working, num_returns=len(working), timeout=60)


def last_updates_after_the_look():
    run = Asynchronous(problem, steps=STEPS, workers=2)
    state = run.wait(progress=False, metrics=Waits(run), log_every=1)
    again = [message(lambda: run.wait(progress=False)), message(run.add_worker)]
    run.close()
    return int(state.step), again


def without_data():
    raise ValueError("there is no such data set.")


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def main():
    cluster = Cluster(8)
    bad = Asynchronous(without_data, steps=STEPS, workers=2)
    late, again = last_updates_after_the_look()
    said = {
        "late": late,
        "again": again,
        "bad": message(lambda: bad.wait(progress=False)),
    }
    cluster.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
