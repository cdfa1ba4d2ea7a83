"""The main job, whole: what it writes, how it goes on, and what it refuses."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.data import digits
from jaxeff.models import build
from jaxeff.quantization import quantize
from jaxeff.training import load_model, save_model
from jaxeff.training.cli import main
from scripts.compress import Config, prepare, run

TINY = (
    *("--model", "mlp", "--epochs", "1", "--finetune-epochs", "1"),
    *("--batch-size", "240", "--latency-batch", "8"),
)


def compress(*args):
    main(run, Config, args=[str(a) for a in args])


def error_of(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        compress(*args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compress") / "run"
    compress("--output", out, *TINY)
    return out


@pytest.mark.slow
def test_every_version_is_a_row_with_every_figure(finished):
    found = json.loads((finished / "results.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[0] == "dense" and names[-1] == "chain" and len(set(names)) == 7
    figures = (
        "accuracy parameters bytes flops latency_s energy_j energy_method "
        "usd_per_million grams_co2"
    )
    for row in found["rows"]:
        assert all(row[key] is not None for key in figures.split()), row["name"]
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["shrunk"]["flops"] < by_name["dense"]["flops"]
    assert by_name["int4"]["bytes"] < by_name["int8 (w8a8)"]["bytes"]
    assert by_name["chain"]["bytes"] < by_name["shrunk"]["bytes"]
    report = (finished / "report.html").read_text()
    assert all(name in report for name in names)


@pytest.mark.slow
def test_each_checkpoint_loads_with_the_models_own_definition(finished):
    model = build("mlp", classes=10)
    _, test = digits()
    shapes = jax.eval_shape(model.init, jr.key(0), jnp.asarray(test.images[:1]))
    found = json.loads((finished / "results.json").read_text())
    for row in found["rows"]:
        folder = finished / row["checkpoint"]
        fn, params, meta = load_model(folder, model.apply, shapes)
        assert meta["name"] == row["name"]
        right = np.argmax(jax.jit(fn)(params, test.images), -1) == test.labels
        assert np.mean(right) == pytest.approx(row["accuracy"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("report.html", "results.json", "models/chain", "models/low-rank"):
        gone = out / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    compress("--output", out, *TINY, "--resume")
    said = capsys.readouterr().out
    assert "dense: from" in said and "chain: from" not in said
    before, after = (
        json.loads((folder / "results.json").read_text())["rows"]
        for folder in (finished, out)
    )
    assert [r["accuracy"] for r in before] == [r["accuracy"] for r in after]
    changed = [*TINY[:-1], "4"]
    said = error_of(capsys, "--output", out, *changed, "--resume")
    assert "has --latency-batch 8, and now it is 4" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--keep", "0"), "(0, 1)"),
        (("--keep", "1.5"), "(0, 1)"),
        (("--retained-energy", "1"), "(0, 1)"),
        (("--temperature", "0"), "--temperature"),
        (("--usd-per-hour", "-1"), "--usd-per-hour"),
        (("--latency-batch", "0"), "--latency-batch"),
        (("--epochs", "-5"), "--epochs"),
        (("--load", "pyproject.toml", "--data", "digits"), "checkpoint"),
        (("--data", "cifar10"), "name the folder"),
        (("--data", "cifar10", "--data-dir", "nowhere"), "nowhere"),
        (("--load", "missing.safetensors"), "there is no such file"),
        (("--place", "atlantis"), "among 59 places. Give a country by its name"),
        (("--model", "mlpp"), "mlpp"),
        (("--batch-size", "100000"), "batch"),
        (("--kep", "0.5"), "--keep"),
        (("--resume",), "holds none"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert says in error_of(capsys, "--output", out, *args)
    assert not out.exists()


def test_a_compressed_model_is_not_compressed_again(tmp_path, capsys, getkey):
    model, x = build("mlp", classes=10), jnp.ones((1, 8, 8, 1))
    fn, params = quantize(model.apply, model.init(getkey(), x), x)
    save_model(tmp_path / "int8", fn, params)
    out = tmp_path / "out"
    args = ("--output", out, "--model", "mlp", "--load", tmp_path / "int8")
    assert "--load the dense one" in error_of(capsys, *args)
    assert not out.exists()


def test_a_run_goes_on_by_its_own_options_alone(tmp_path, capsys):
    prepare(Config(output=tmp_path))
    args = ("--output", tmp_path, "--resume", "--keep", "0.3", "--epochs", "2")
    said = error_of(capsys, *args)
    assert "--keep 0.5, and now it is 0.3" in said and "now it is 2;" in said


def test_a_missing_package_is_one_line_with_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    args = ("--output", tmp_path / "out", "--load", file, "--data", "cifar10")
    said = error_of(capsys, *args)
    assert "needs the package safetensors" in said and "'.[export]'" in said


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "empty folder" in error_of(capsys, "--output", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_model_file_is_refused(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not a model")
    assert "safetensors" in error_of(
        capsys, "--output", tmp_path / "out", "--load", file, "--data", "cifar10"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, capsys):
    args = ("--output", tmp_path / "out", *TINY, "--learning-rate", "1e30")
    assert "at step" in error_of(capsys, *args)


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert "--resume" in error_of(capsys, "--output", finished, *TINY)
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_starts_from_the_dense_model_of_another_and_shrinks_in_rounds(
    finished, tmp_path
):
    out = tmp_path / "run"
    dense = finished / "models" / "dense"
    compress("--output", out, *TINY, "--load", dense, "--rounds", "2")
    rows = lambda folder: json.loads((folder / "results.json").read_text())["rows"]
    assert rows(out)[0]["accuracy"] == rows(finished)[0]["accuracy"]
    # Two rounds leave as many channels as one.
    assert rows(out)[1]["parameters"] == rows(finished)[1]["parameters"]
    assert (out / "steps" / "shrunk-round-2").is_dir()
