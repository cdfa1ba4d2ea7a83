import json
import math

import jax
import pytest

from jaxeff.training.results import about, rows_so_far, write_json


def test_what_is_said_of_the_machine_is_json_and_true(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    said = json.loads(json.dumps(about()))
    assert said["versions"]["jax"] == jax.__version__
    assert said["environment"]["XLA_FLAGS"] == ""
    assert "GLIBC_TUNABLES" not in said["environment"]
    assert said["platform"] == jax.default_backend()
    assert said["devices"] == jax.device_count() and len(said["date"]) == 10


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    for bad in ({1, 2}, math.nan):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, bad)
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_benchmark_goes_on_only_from_rows_made_the_same_way(tmp_path):
    path, options = tmp_path / "rows.json", {"steps": 3, "sizes": (1, 2)}
    assert rows_so_far(path, options) == []
    rows = [{"way": "a", "loss": 1.0}]
    write_json(path, {"options": options, "rows": rows})
    assert rows_so_far(path, options) == rows
    with pytest.raises(ValueError, match="'steps': 3.*'steps': 4.*another --output"):
        rows_so_far(path, options | {"steps": 4})
