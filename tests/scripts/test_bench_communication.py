import json

import pytest

from scripts.bench import communication
from scripts.bench.communication import Config, Found, run


def test_what_is_sent_is_what_the_theory_says_and_it_goes_on(tmp_path, capsys):
    output = tmp_path / "out.json"
    run(Config(only=("ring", "tensor"), output=output))
    rows = json.loads(output.read_text())["rows"]
    assert [r["what"] for r in rows] == ["sums", "forward", "backward"]
    assert all(r["sent"] == r["theory"] > 0 and r["on"] == "cpu" for r in rows)
    capsys.readouterr()
    run(Config(only=("ring", "tensor"), output=output))
    said = capsys.readouterr().out
    assert "ring on cpu:" not in said and said.count("1.00") == 3


def test_anything_else_is_an_error(tmp_path, monkeypatch):
    twice = lambda devices: Found({"sums": 1.0}, {"sums": 2.0})
    monkeypatch.setitem(communication.WAYS, "ring", twice)
    with pytest.raises(SystemExit, match="1 rows are not what the theory says"):
        run(Config(only=("ring",), output=tmp_path / "out.json"))
    with pytest.raises(ValueError, match="no way 'rings'"):
        run(Config(only=("rings",), output=tmp_path / "out.json"))
