"""A run on Ray, in a program of its own: Ray starts processes, and they warn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_workers_may_die_and_stop_and_come(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests/training/on_ray.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert {"killed", "stopped", "joined", "alone"} <= said["happened"].keys()
    assert sorted(said["batches"]) == list(range(80))
    assert said["happened"]["name"] in said["workers"]
    assert said["staleness"] <= 6
    assert said["step"] == 80 and said["finite"]
    assert said["again"] == [0, True]
    assert "[80]" in said["wrong"] and "[81]" in said["wrong"]
