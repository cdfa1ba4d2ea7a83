"""A run on Ray, in a program of its own: Ray starts processes, and they warn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def ends():
    return result_of("on_ray_ends.py")


@pytest.mark.slow
def test_a_run_whose_last_updates_come_after_a_look_is_finished(ends):
    assert ends["late"] == 6
