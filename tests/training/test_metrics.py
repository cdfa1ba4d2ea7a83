import json
import sys

import pytest

from jaxeff.training import Metrics, read_metrics


def write(folder, steps, **options):
    with Metrics(folder, **options) as metrics:
        for n in steps:
            metrics.write(n, {"loss": 1 / n})


def test_a_resumed_run_leaves_the_file_of_a_run_without_a_break(tmp_path):
    write(tmp_path / "straight", range(1, 9))
    write(tmp_path / "broken", range(1, 7))
    # Killed at step 6, in the middle of a line; the last checkpoint was step 4.
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    write(tmp_path / "broken", range(5, 9), start_step=4)
    straight, broken = (
        (tmp_path / name / "metrics.jsonl").read_bytes()
        for name in ("straight", "broken")
    )
    assert straight == broken


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(3, {"loss": 0.5})
        assert read_metrics(tmp_path) == [{"step": 3, "loss": 0.5}]


def test_every_line_is_strict_json(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"a": float("nan"), "b": float("inf"), "c": 1})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    write(tmp_path, [1, 2], tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    # The record format: length (8), its checksum (4), the event, its checksum (4).
    data, seen = events.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = proto.Event.FromString(data[12 : 12 + size])
        seen += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert seen == [(1, "loss", 1.0), (2, "loss", 0.5)]


def test_tensorboard_asked_for_and_missing_is_an_error_that_writes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
        Metrics(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
