"""A run on Ray, in a program of its own: Ray starts processes, and they warn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff.training import Aux, Checkpoints
from jaxeff.training.asynchronous import _Server, Asynchronous, Options, Problem
from jaxeff.training.server import Done

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def result_of(program, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests/training" / program, *args],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_workers_may_die_and_stop_and_come(tmp_path):
    said = result_of("on_ray.py", tmp_path)
    assert {"killed", "stopped", "joined", "alone"} <= said["happened"].keys()
    assert sorted(said["batches"]) == list(range(80))
    assert said["happened"]["name"] in said["workers"]
    assert said["staleness"] <= 6
    assert said["step"] == 80 and said["finite"]
    assert said["again"] == [0, True]
    assert "[80]" in said["wrong"] and "[81]" in said["wrong"]


def test_weights_that_turned_infinite_are_never_saved(tmp_path):
    tx, params = optax.sgd(1.0), {"w": jnp.zeros(2)}
    problem = lambda: Problem(lambda p, b, k: None, tx, params, None, jr.key(0))
    options = {"staleness": 0, "compensation": 0, "lease": 60, "checkpoint_every": 1}
    server = _Server()
    server.open(problem, Options(steps=3, folder=tmp_path, **options))
    told = []
    for gradient in (1.0, np.inf):
        _, work = server.take("a")
        grads = {"w": np.full(2, gradient, np.float32)}
        server.give(work.ticket, Done(grads, Aux(), 0.0, 1))
        told.append(server.look())
    server.end()
    assert told == [([(0.0, 1)], 1, None), ([(0.0, 1)], 1, 2)]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


@pytest.fixture(scope="module")
def ends():
    return result_of("on_ray_ends.py")


@pytest.mark.slow
def test_a_run_whose_last_updates_come_after_a_look_is_finished(ends):
    assert ends["late"] == 6


@pytest.mark.slow
def test_what_is_wrong_with_a_problem_is_one_line(ends):
    assert ends["bad"] == "there is no such data set."


@pytest.mark.parametrize(
    "bad", [{"staleness": -1}, {"compensation": float("nan")}, {"lease": 0}]
)
def test_numbers_that_no_run_can_have_start_nothing(bad):
    with pytest.raises(ValueError, match="0 or more and a lease above 0 s, got"):
        Asynchronous(lambda: None, steps=1, workers=1, **bad)


@pytest.mark.slow
def test_a_run_that_is_over_says_so(ends):
    assert len(ends["again"]) == 2
    for said in ends["again"]:
        assert said is not None and "this one is over" in said
