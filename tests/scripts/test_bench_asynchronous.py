"""The benchmark of asynchronous workers, as a program of its own and cut short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.asynchronous import wrong

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.mark.slow
def test_every_batch_is_counted_once_though_a_worker_dies(tmp_path, data_dir):
    pytest.importorskip("ray")
    output = tmp_path / "rows.json"
    options = {
        "--data-dir": data_dir("fashion_mnist"),
        "--workers": 2,
        "--steps": STEPS,
        "--batch-size": 16,
        "--output": output,
    }
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/bench/asynchronous.py",
            *(str(part) for option in options.items() for part in option),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.exists(), result.stderr
    before, after = json.loads(output.read_text())["rows"]
    assert result.returncode == (wrong(before, after) is not None), result.stderr
    assert after["lost"] == after["twice"] == 0
    assert sum(after["by_worker"].values()) == STEPS
    assert after["killed"] < after["joined"] < STEPS


def test_a_lost_batch_one_counted_twice_or_a_worse_model_is_wrong():
    before = {"accuracy": 0.9}
    fine = {"accuracy": 0.895, "lost": 0, "twice": 0}
    assert wrong(before, fine) is None
    for bad in ({"lost": 1}, {"twice": 1}):
        assert wrong(before, fine | bad) == "a batch was lost or counted twice"
    assert "worse" in (wrong(before, fine | {"accuracy": 0.889}) or "")
