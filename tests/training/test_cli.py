import dataclasses
import os
import subprocess
import sys
from typing import Literal

import pytest

from jaxeff.training import extras
from jaxeff.training.cli import join_processes, main, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Does nothing."""

    model: Literal["mlp", "cnn"] = "mlp"
    """which network"""
    steps: int | None = None
    """in all"""
    batch_size: int = 64
    """examples"""


def error_of(capsys, run, *args):
    with pytest.raises(SystemExit) as stop:
        main(run, Config, args=args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_the_options_are_the_fields_of_the_dataclass():
    assert parse(Config, args=[]) == Config()
    given = ["--model", "cnn", "--steps", "7", "--batch-size=3"]
    assert parse(Config, args=given) == Config(model="cnn", steps=7, batch_size=3)


def test_help_names_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(print, Config, args=["--help"], description="Trains.")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for words in ("Trains.", "--model", "which network", "(default: 64)", "examples"):
        assert words in said


@pytest.mark.parametrize(
    "args, words",
    [
        (["--batchsize", "3"], "no option --batchsize. Did you mean --batch-size?"),
        (["--batchsize=3"], "no option --batchsize. Did you mean --batch-size?"),
        (["--zzz"], "no option --zzz. --help lists the 3 options"),
        (["cnn"], "'cnn' stands alone"),
        (["--model", "rnn"], "invalid choice 'rnn' for argument '--model'"),
        (["--steps", "x"], "--steps: no type matching {None}|INT"),
        (["--steps"], "Missing value for argument '--steps'"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(capsys, monkeypatch, args, words):
    monkeypatch.setenv("COLUMNS", "50")  # the line is whole in any terminal
    assert words in error_of(capsys, print, *args)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_line_is_the_same_whatever_a_terminal_can_draw(encoding):
    code = "from tests.training.test_cli import *; main(print, Config)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--batch-size", "x"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: Error parsing --batch-size: invalid literal for int() with base 10: "
        "'x' See --help.\n"
    )


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_an_error_of_the_library_is_one_line_and_status_2(capsys, kind):
    def run(config):
        raise kind("the rule,\n  the numbers,\n  the way out")

    assert error_of(capsys, run) == "error: the rule, the numbers, the way out\n"


def test_a_bug_keeps_its_traceback(capsys, monkeypatch):
    def bug(config):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        main(bug, Config, args=[])

    def bad(config):
        raise ValueError("bad input")

    monkeypatch.setenv("JAXEFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad input"):
        main(bad, Config, args=[])


def test_a_reader_that_leaves_early_is_no_error():
    code = "from tests.training.test_cli import *; main(print, Config)"
    command = f"{sys.executable} -c '{code}' --help | head -1; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": ".", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] in ("0", "1") and not done.stderr


def test_ctrl_c_ends_with_the_status_a_shell_expects(capsys):
    def run(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main(run, Config, args=[])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_one_process_joins_nothing():
    assert not join_processes({})
    assert not join_processes({"SLURM_NTASKS": "1", "SLURM_LOCALID": "0"})
    assert not join_processes({"TPU_WORKER_HOSTNAMES": "one"})


def test_half_a_description_of_the_job_is_an_error():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID, but the last two .*'2' .*''"):
        join_processes(
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
        )


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1"])
def test_an_address_without_host_or_port_is_an_error(address):
    job = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    with pytest.raises(ValueError, match=f"is host:port, got '{address}'"):
        join_processes({"JAX_COORDINATOR_ADDRESS": address, **job})


def test_a_missing_package_of_an_extra_is_one_line_that_says_how_to_get_it(capsys):
    def run(config):
        raise ModuleNotFoundError("No module", name="safetensors")

    assert "pip install -e '.[export]'" in error_of(capsys, run)

    def fault(config):
        raise ModuleNotFoundError("No module", name="jaxeff.gone")

    with pytest.raises(ModuleNotFoundError):
        main(fault, Config, args=[])


def test_what_extra_brings_a_package_is_known_without_the_source(monkeypatch):
    said = ["jax>=0.10", "safetensors>=0.5; extra == 'export'", 'a; extra == "b"']
    monkeypatch.setattr(extras, "_checkout", lambda: None)
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda _: said)
    assert extras.extra_of("safetensors") == "export" and extras.extra_of("a") == "b"
    assert extras.extra_of("jax") is None
    assert extras.advice("safetensors").endswith("pip install 'jaxeff[export]'")
    assert extras.advice("torch").endswith("pip install torch")
