"""Each part of the GPU benchmark on a tiny model, and what it says without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxeff.models import LlamaConfig
from scripts.bench import gpu, gpu_parts

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_without_a_known_peak_there_is_no_mfu_but_all_else",
    "test_the_tests_marked_gpu_are_found_and_run",
    "test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing",
    "test_training_counts_its_tokens_and_names_its_peak",
}

ROOT = Path(__file__).resolve().parents[2]
TINY = LlamaConfig(
    vocab_size=64, d_model=32, hidden=64, n_layers=2, n_heads=4, n_kv_heads=2
)


def test_training_counts_its_tokens_and_names_its_peak():
    found = gpu_parts.measure_training(
        TINY, batch_size=2, sequence=16, steps=3, peak=1e12
    )
    assert found["right"] and found["last_loss"] < found["first_loss"]
    assert found["tokens_per_second"] * found["seconds_per_step"] == pytest.approx(32)
    embedding, kernels = 64 * 32, 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    kernels += 32 * 64  # the head
    assert found["parameters"] == embedding + kernels + 5 * 32
    half, full = found["mfu"]
    attention = 12 * 2 * 4 * 8 * 16
    assert full["flops_per_step"] == 32 * (6 * kernels + attention)
    assert half["flops_per_step"] == 32 * (6 * kernels + attention / 2)
    for how in (half, full):
        seconds = found["seconds_per_step"]
        want = how["flops_per_step"] / seconds / 1e12
        assert how["fraction"] == pytest.approx(want)
        assert how["convention"] in how["said"] and "1 TFLOP/s" in how["said"]
    json.dumps(found, allow_nan=False)


def test_without_a_known_peak_there_is_no_mfu_but_all_else(capsys):
    found = gpu_parts.measure_training(TINY, batch_size=1, sequence=8, steps=1)
    assert found["mfu"] == [] and found["tokens_per_second"] > 0
    assert "no peak or power is known for 'cpu'" in capsys.readouterr().out


def test_products_of_every_type_are_checked_and_timed():
    found = gpu_parts.measure_products([64, 128], calls=2, repeats=2, max_seconds=1.0)
    assert found["right"] and list(found["sizes"]) == ["64", "128"]
    for rows in found["sizes"].values():
        assert list(rows) == ["bf16", "int8", "fp8 e4m3"]
        assert rows["int8"]["error"] == 0
        assert all(row["tera_operations_per_second"] > 0 for row in rows.values())
    json.dumps(found, allow_nan=False)


def test_a_type_the_device_lacks_costs_no_other(monkeypatch):
    lacks = {**gpu_parts.PRODUCTS, "none": (jnp.int8, jnp.complex64, 0.0)}
    monkeypatch.setattr(gpu_parts, "PRODUCTS", lacks)
    found = gpu_parts.measure_products([64], calls=1, repeats=1, max_seconds=1.0)
    assert "failed" in found["sizes"]["64"]["none"] and found["right"]
    assert found["sizes"]["64"]["bf16"]["tera_operations_per_second"] > 0


@pytest.mark.slow
def test_compressed_models_compute_what_they_stand_for():
    found = gpu_parts.measure_forward(
        TINY,
        workloads={"1 token": (1, 1), "2 x 8 tokens": (2, 8)},
        repeats=2,
        max_seconds=1.0,
        dtype=jnp.float32,
    )
    assert found["right"]
    for rows in found["workloads"].values():
        assert list(rows) == ["dense", "shrunk", "int8", "w8a8"]
        assert rows["dense"]["error"] == 0 and rows["dense"]["ratio"] == 1
        # In float32 only the order of sums differs, except for rounded activations.
        assert rows["shrunk"]["error"] < 1e-5 and rows["int8"]["error"] < 1e-5
        assert 1e-4 < rows["w8a8"]["error"]
        assert rows["shrunk"]["parameters"] < 0.55 * rows["dense"]["parameters"]
        assert rows["int8"]["bytes"] < 0.4 * rows["dense"]["bytes"]
    json.dumps(found, allow_nan=False)


def start(*args, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, ROOT / "scripts" / "bench" / "gpu.py", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path):
    done = start("--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: this measures a GPU, but JAX ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, words",
    [
        (["--size", "8"], "unrecognized arguments: --size 8"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--batch-size", "0"], "--batch-size: a whole number above 0, got '0'"),
        (["--parts", "tea"], "invalid choice: 'tea'"),
    ],
)
def test_bad_options_are_one_line_and_status_2(capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        gpu.read_options(args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_it_imports_only_what_a_gpu_host_has_and_takes_no_device():
    # What comes with Flax and JAX, and jaxtyping.
    code = (
        "import sys, json, jax, scripts.bench.gpu;"
        "print(json.dumps([m.split('.')[0] for m in sys.modules]));"
        # This fails once a device was asked for.
        "jax.config.update('jax_num_cpu_devices', 3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    absent = {"tyro", "chex", "beartype", "equinox", "safetensors", "tensorboardX"}
    absent |= {"hypothesis", "pytest", "sklearn"}
    assert done.returncode == 0, done.stderr
    assert not absent & set(json.loads(done.stdout))


def test_a_missing_package_is_named_in_one_line():
    code = "import sys; sys.modules['flax'] = None; import scripts.bench.gpu"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == (
        "error: there is no package flax here. pip install flax.\n"
    )


def test_the_tests_marked_gpu_are_found_and_run(monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = gpu.test(gpu.read_options([]))
    # Without a GPU they skip, which is no failure, and nothing else is collected.
    assert found["right"] and " skipped" in found["said"]
    assert "passed" not in found["said"]


def test_without_pytest_the_tests_are_not_run(monkeypatch):
    find = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda n: None if n == "pytest" else find(n))
    found = gpu.test(gpu.read_options([]))
    assert found == {"said": "not run: pytest not installed", "right": True}


def test_a_part_that_fails_or_takes_too_long_costs_no_other(tmp_path, monkeypatch):
    # Without a GPU, every part ends with status 2 and writes nothing.
    args = ["--output", str(tmp_path / "gpu.json")]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status, found = gpu.in_process("training", args, 60.0)
    assert status == 2
    assert found == {"failed": "exit status 2", "right": False}
    status, found = gpu.in_process("training", args, 0.01)
    assert status == 1 and "took more than" in found["failed"]


def test_the_results_of_all_parts_are_one_file(tmp_path, monkeypatch, capsys):
    parts = {
        "about": {"device": "a GPU", "versions": {"jax": "1"}},
        "products": {"right": True},
        "tests": {"right": False, "failed": "exit status 1"},
    }
    monkeypatch.setattr(gpu, "in_process", lambda part, *_: (0, parts[part]))
    path = tmp_path / "gpu.json"
    status = gpu.main(["--parts", "products", "tests", "--output", str(path)])
    assert status == 1 and "tests: WRONG: exit status 1" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["device"] == "a GPU" and written["products"]["right"]
    assert gpu.main(["--parts", "products", "--output", str(path)]) == 0
