"""Whole runs of `scripts/train.py`: as a program where it matters, else called."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxeff.models import build
from jaxeff.training import load_model, read_metrics
from jaxeff.training.cli import main, parse
from scripts import train as script
from scripts.launch import free_address
from scripts.train import Config, run

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_devices_that_share_the_weights_train_what_one_trains[axes0]",
    "test_devices_that_share_the_weights_train_what_one_trains[axes1]",
    "test_image_models_train_on_colour_images_augmented[cnn-stages=((4,), (4,))]",
    "test_what_cannot_run_is_one_line_and_leaves_nothing_behind",
    "test_language_models_learn_from_text[llama]",
    "test_language_models_learn_from_text[gpt]",
    "test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_up",
}

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--model", "mlp", "--sizes", "features=(16,)", "--batch-size", "40"),
    *("--learning-rate", "0.02"),
)


def train(*args):
    """The program, called."""
    main(run, Config, args=[str(a) for a in args])


def error_of(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        train(*args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def start(*args, **environment):
    """The program, started."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, ROOT / "scripts" / "train.py", *map(str, args)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def saved(folder, step):
    """Every array of a checkpoint, by name, as bytes."""
    path = folder / "checkpoints" / str(step) / "arrays"
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        with warnings.catch_warnings(action="ignore"):  # of shardings not given
            arrays = checkpointer.restore(path)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = lambda x: np.asarray(jr.key_data(x) if is_key(x) else x)
    return {name: raw(x).tobytes() for name, x in arrays.items()}


def first_step(out):
    """Where a run began, by its own words."""
    return int(out.split("; steps ")[1].split()[0])


def lines(folder):
    """The metrics without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k != "examples_per_second"}
        for line in read_metrics(folder)
    ]


def cifar10(folder, n=80):
    """A few random images in the files of CIFAR-10."""
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (n, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(records.tobytes())
    return folder


def write_text(path, n=4000):
    path.write_bytes(np.random.default_rng(0).integers(0, 9, n).astype(np.uint8))
    return path


@pytest.mark.slow
def test_a_run_killed_twice_is_the_run_without_a_break_bit_for_bit(tmp_path):
    options = (*TINY, "--steps", 300, "--checkpoint-every", 10, "--log-every", 7)
    straight = start(*options, "--output", tmp_path / "straight")
    broken, at = tmp_path / "broken", []
    for sent, step in [(signal.SIGTERM, 20), (signal.SIGKILL, 100)]:
        process = start(*options, "--output", broken, "--resume")
        seen = broken / "checkpoints" / str(step)
        while process.poll() is None and not seen.exists():
            time.sleep(0.005)
        process.send_signal(sent)
        out, _ = finish(process, -sent)
        at.append(first_step(out))
    assert not (broken / "checkpoints" / "300").exists()
    out, _ = finish(start(*options, "--output", broken, "--resume"))
    at.append(first_step(out))
    assert at[0] == 0 and 20 <= at[1] <= 90 and 100 <= at[2] < 300

    finish(straight)
    assert saved(broken, 300) == saved(tmp_path / "straight", 300)
    assert lines(broken) == lines(tmp_path / "straight")
    # Of the three kept, and no half-written one.
    kept = {p.name for p in (broken / "checkpoints").iterdir()}
    assert kept == {"280", "290", "300"}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 2])
def test_where_one_process_is_gone_or_stuck_the_others_end(tmp_path, sent, which):
    folder, timeout = tmp_path / "run", 8
    options = (*TINY, "--steps", 100_000, "--checkpoint-every", 50)
    limits = ("--timeout", timeout, "--output", folder)
    job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "4"}
    four = [start(*options, *limits, **job, JAX_PROCESS_ID=str(i)) for i in range(4)]
    try:
        while not (folder / "checkpoints" / "100").exists():
            assert all(process.poll() is None for process in four)
            time.sleep(0.01)
        four[which].send_signal(sent)
        began = time.monotonic()
        for process in (p for i, p in enumerate(four) if i != which):
            _, err = process.communicate(timeout=10 * timeout)
            if (which, sent, process.returncode) == (
                0,
                signal.SIGKILL,
                -signal.SIGABRT,
            ):
                # It coordinates the job, and the runtime may be first to miss it.
                assert "another task died" in err
                continue
            assert process.returncode == 75, err
            (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
            assert "of a job" in line or "of the job" in line
            assert re.search(r"last checkpoint is step \d+ in .*go on from there", line)
        assert time.monotonic() - began < 3 * timeout
    finally:
        for process in four:
            process.kill()
            process.communicate()
    # Whoever goes on does so from a whole checkpoint; one process can, too.
    last = max(int(p.name) for p in (folder / "checkpoints").iterdir())
    more = ("--steps", last + 5, "--output", folder, "--resume")
    assert f"steps {last} to {last + 5}" in finish(start(*TINY, *more))[0]


@pytest.mark.slow
def test_four_processes_are_launched_as_one_job(tmp_path):
    folder = tmp_path / "run"
    program = (*TINY, "--steps", 10, "--output", folder)
    launch = [sys.executable, ROOT / "scripts" / "launch.py", "--processes", "4"]
    command = [*launch, "--", ROOT / "scripts" / "train.py", *map(str, program)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 device(s) of 4 process(es)" in done.stdout and "step 10" in done.stdout
    bad = [*command, "--steps", "0"]
    done = subprocess.run(bad, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "[3] error: --steps is 1 or more" in done.stderr
    assert re.search(r"error: process \d of 4 ended with status 2", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(), ("--tensor", 4)], ids=["data", "tensor"])
def test_two_processes_train_what_one_trains(tmp_path, axes):
    options = (*TINY, "--steps", 20, "--checkpoint-every", 5)
    job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    job["JAX_NUM_CPU_DEVICES"] = "2"
    out = ("--output", tmp_path / "two")
    two = [start(*options, *axes, *out, **job, JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    (said, _), (silent, _) = map(finish, two)
    assert "4 device(s) of 2 process(es)" in said and "step 20" in said
    assert "step 20" not in silent  # process 0 speaks for all
    finish(start(*options, "--output", tmp_path / "one"))
    loss = lambda name: [x["loss"] for x in lines(tmp_path / name) if "loss" in x]
    assert np.allclose(loss("two"), loss("one"), rtol=1e-3)


def test_the_program_shows_its_options_and_refuses_unknown_ones(tmp_path):
    helped, wrong = start("--help"), start("--optimiser", "sgd")
    out, _ = finish(helped)
    for name in ("--model", "--data-dir", "--batch-size", "(default: 128)"):
        assert name in out
    assert "python scripts/train.py --data digits --model cnn" in out
    out, err = finish(wrong, 2)
    assert not out and err.startswith("error: there is no option --optimiser")
    assert err.count("\n") == 1


def test_a_run_leaves_its_metrics_its_options_and_its_model(tmp_path):
    out = tmp_path / "run"
    train(*TINY, "--epochs", 2, "--eval-every", 35, "--output", out, "--tensorboard")
    steps = 2 * (1437 // 40)
    found = lines(out)
    assert [x["step"] for x in found if "test_accuracy" in x] == [35, 70]
    assert found[-1]["step"] == steps and found[-1]["test_accuracy"] > 0.8
    assert json.loads((out / "config.json").read_text())["batch_size"] == 40
    assert list((out / "tensorboard").glob("events*"))
    model = build("mlp", features=(16,))
    images = jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(model.init, jr.key(0), images)
    fn, params, about = load_model(out / "model", model.apply, shapes)
    assert fn(params, images).shape == (1, 10)
    assert about["model"] == "mlp" and about["steps"] == steps


def test_the_parts_of_a_batch_are_a_run_like_the_whole(tmp_path):
    losses = []
    for parts in (1, 5):
        out = tmp_path / str(parts)
        options = ("--accumulate", parts, "--log-every", 10, "--output", out)
        train(*TINY, "--steps", 10, *options)
        losses.append(lines(out)[0]["loss"])
    assert np.allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("axes", [("--fsdp", 2, "--tensor", 2), ("--zero",)])
def test_devices_that_share_the_weights_train_what_one_trains(tmp_path, axes):
    run = (*TINY[:3], "features=(512,)", *TINY[4:], "--log-every", 1, "--output")
    losses = lambda name: [x["loss"] for x in lines(tmp_path / name) if "loss" in x]
    train(*run, tmp_path / "one", "--steps", 4)
    train(*run, tmp_path / "many", *axes, "--steps", 4)
    assert np.allclose(losses("many"), losses("one"), rtol=1e-4)
    train(*run, tmp_path / "many", *axes, "--steps", 6, "--resume")
    assert len(losses("many")) == 6 and losses("many")[-1] < losses("many")[0]
    model = build("mlp", features=(512,))
    shapes = jax.eval_shape(model.init, jr.key(0), jnp.zeros((1, 8, 8, 1)))
    _, params, _ = load_model(tmp_path / "many" / "model", model.apply, shapes)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.slow
def test_workers_train_the_same_model(tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "run"
    options = ("--workers", 2, "--steps", 80, "--output", out, "--log-every", 40)
    said, _ = finish(start(*TINY, *options))
    assert "2 worker(s), asynchronous; steps 0 to 80" in said
    found = lines(out)
    assert [x["step"] for x in found] == [40, 80, 80]
    assert found[-1]["test_accuracy"] > 0.8
    again, _ = finish(start(*TINY, *options, "--resume"))
    assert "nothing to do" in again
    _, err = finish(start(*TINY, *options, "--steps", 90, "--resume"), 2)
    assert err.startswith("error: ") and "steps" in err and err.count("\n") == 1


def test_a_worker_takes_whole_batches_that_divide_by_no_device(tmp_path, monkeypatch):
    def started(problem, **options):
        assert len(problem().batch(0).labels) == 99
        raise ValueError("started")

    monkeypatch.setattr(script, "Asynchronous", started)
    options = (*TINY, "--workers", 1, "--batch-size", 99, "--output", tmp_path / "run")
    with pytest.raises(ValueError, match="started"):
        run(parse(Config, args=[str(option) for option in options]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_too(tmp_path, dtype):
    out = tmp_path / "run"
    train(*TINY, "--steps", 80, "--dtype", dtype, "--output", out, "--log-every", 80)
    *_, last, evaluation = lines(out)
    assert last["loss"] < 1 and evaluation["test_accuracy"] > 0.8
    assert ("skipped" in last) == (dtype == "float16")


@pytest.mark.parametrize(
    "model, sizes",
    [
        ("cnn", "stages=((4,), (4,))"),
        pytest.param("mobilenet", "width=0.25", marks=pytest.mark.slow),
        pytest.param("resnet20", "width=4", marks=pytest.mark.slow),
    ],
)
def test_image_models_train_on_colour_images_augmented(tmp_path, model, sizes):
    folder = cifar10(tmp_path / "data")
    data = ("--data", "cifar10", "--data-dir", folder, "--batch-size", 16)
    out = tmp_path / "run"
    train(*data, "--model", model, "--sizes", sizes, "--steps", 3, "--output", out)
    assert "test_accuracy" in lines(out)[-1]


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_language_models_learn_from_text(tmp_path, model):
    write_text(tmp_path / "a.txt")
    out = tmp_path / "run"
    sizes = ("--sizes", "d_model=16", "n_layers=1", "n_heads=2")
    data = ("--data", "text", "--data-dir", tmp_path, "--sequence", 16)
    options = ("--batch-size", 16, "--learning-rate", 0.02, "--steps", 60)
    train("--model", model, *sizes, *data, *options, "--output", out)
    # Random text of nine letters: from log(256) towards log(9), no further.
    assert np.log(9) - 0.1 < lines(out)[-1]["unseen_nats_per_byte"] < 3


def test_a_bad_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    bad = (*TINY, "--learning-rate", 1e30, "--steps", 50, "--checkpoint-every", 1)
    said = error_of(capsys, *bad, "--output", out)
    assert "the loss is nan at step 2" in said and "good checkpoint is step 1" in said
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["1"]
    assert not (out / "model").exists()


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_up(tmp_path, capsys):
    out = tmp_path / "run"
    run = (*TINY, "--output", out)
    train(*run, "--steps", 4)
    before = saved(out, 4), lines(out), (out / "config.json").read_text()
    for args, words in [
        (("--steps", 9), "Go on from the last one with --resume, or name another"),
        (("--resume", "--steps", 3), "is at step 4, past the 3 steps asked for"),
        (("--resume", "--seed", 1), "has --seed 0, and now it is 1"),
        (("--resume", "--model", "cnn"), "has --model mlp, and now it is cnn"),
    ]:
        assert words in error_of(capsys, *run, *args)
    assert (saved(out, 4), lines(out), (out / "config.json").read_text()) == before
    capsys.readouterr()
    train(*run, "--resume", "--steps", 6)
    assert [line["step"] for line in lines(out)] == [4, 4, 6, 6]
    assert "from step 4 on its learning rate is that of a run of 6 steps" in (
        capsys.readouterr().out
    )
    model = (out / "model").stat().st_mtime_ns
    train(*run, "--resume", "--steps", 6)
    assert "nothing to do, its 6 steps are done" in capsys.readouterr().out
    assert (out / "model").stat().st_mtime_ns == model


def test_what_a_missing_package_or_a_small_vocabulary_stops_leaves_nothing(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    text = ("--data", "text", "--data-dir", write_text(tmp_path / "a.txt"))
    text += ("--sequence", 16, "--model", "gpt", "--sizes")
    sizes = ("d_model=16", "n_layers=1", "n_heads=2")
    small = error_of(capsys, *text, *sizes, "vocab_size=8", "--output", out)
    assert "this one has 8 and the data 9. Leave vocab_size" in small
    few = (*TINY[:3], "features=(16,)", "classes=3", "--output", out)
    assert "this one has 3 and the data 10" in error_of(capsys, *few)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    said = error_of(capsys, *TINY, "--tensorboard", "--output", out)
    assert "TensorBoard events need" in said and "'.[tensorboard]'" in said
    assert not out.exists()


def test_a_checkpoint_of_another_model_is_named_by_its_arrays(tmp_path, capsys):
    out = tmp_path / "run"
    train(*TINY, "--output", out, "--steps", 2)
    (out / "config.json").unlink()
    other = ("--model", "mlp", "--batch-size", "40", "--resume", "--steps", 3)
    said = error_of(capsys, *other, "--output", out)
    assert "differs in " in said and "[64, 16] float32 there and [64, 256]" in said


def test_what_cannot_run_is_one_line_and_leaves_nothing_behind(tmp_path, capsys):
    empty, cut = tmp_path / "empty", cifar10(tmp_path / "cut")
    empty.mkdir()
    (cut / "train.bin").write_bytes(b"\0" * 4000)
    short = write_text(tmp_path / "short.txt", 200)
    text = ("--model", "gpt", "--data", "text", "--data-dir")
    out = tmp_path / "out"
    for args, words in [
        (("--data", "cifar10"), "name the folder that holds its files"),
        (("--data", "cifar10", "--data-dir", empty), "must hold the train images"),
        (("--data", "cifar10", "--data-dir", cut), "train.bin has 4000 bytes"),
        (("--data", "cifar10", "--data-dir", tmp_path / "no"), "no is missing"),
        ((*text[:4],), "name it with --data-dir"),
        ((*text, empty), "has 0: none. Name the file itself"),
        ((*text, tmp_path / "no.txt"), "no.txt is missing"),
        ((*text, short), "at least sequence + 1 = 129 bytes"),
        ((*text, short, "--epochs", 1), "a text has no epochs"),
        (("--model", "gpt"), "--model gpt does not take --data digits"),
        (("--data", "text", "--data-dir", short), "Choose one of gpt, llama"),
        (("--batch-size", 12), "a batch of 12 does not divide by 8"),
        (("--batch-size", 8000), "batch_size is 8000 and digits/train has 1437"),
        (("--steps", 0), "--steps is 1 or more, got 0"),
        (("--accumulate", 3), "16 examples (of a device, with per_device) do not into"),
        (("--fsdp", 3), "fsdp(3) = 3 does not divide the 8 devices"),
        (("--fsdp", 8, *TINY), "no weight can be split among 8 devices"),
        (("--tensor", 2, "--accumulate", 2), "but --fsdp is 1, --tensor 2 and"),
        (("--workers", -1), "--workers is 0 or more, got -1"),
        (("--workers", 2, "--dtype", "float16"), "Use bfloat16, no --eval-every"),
        (("--staleness", 2), "--staleness bounds how far --workers drift apart, got 2"),
        (("--workers", 2, "--staleness", -1), "--staleness is 0 or more, got -1"),
        (("--learning-rate", -1), "--learning-rate is above 0, got -1.0"),
        (("--sizes", "width=9"), "no option width"),
        (("--sizes", "stages=wide"), "got 'stages=wide'"),
        (("--sizes", "stages"), "got 'stages'"),
        (("--epochs", "x"), "error: Error parsing --epochs: no type matching"),
    ]:
        assert words in error_of(capsys, *args, "--output", out)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, at_least", [("fashion_mnist", 0.75), ("cifar10", 0.3)])
def test_an_mlp_learns_the_real_images(tmp_path, data_dir, name, at_least):
    data = ("--data", name, "--data-dir", data_dir(name), "--batch-size", 200)
    train("--model", "mlp", *data, "--steps", 150, "--output", tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["test_accuracy"] > at_least


@pytest.mark.slow
def test_a_gpt_learns_shakespeare(tmp_path, data_dir):
    folder = data_dir("tiny_shakespeare")
    text = ("--data", "text", "--data-dir", folder, "--sequence", 64)
    sizes = ("--sizes", "d_model=64", "n_layers=2")
    steps = ("--batch-size", 32, "--learning-rate", 3e-3, "--steps", 200)
    train("--model", "gpt", *text, *sizes, *steps, "--output", tmp_path / "run")
    # Bytes by their frequency alone take 3.3 nats each.
    assert lines(tmp_path / "run")[-1]["unseen_nats_per_byte"] < 2.6
