import json

import pytest

from jaxeff.parallelism import Schedule
from jaxeff.training.cli import main
from scripts.bench import pipeline

SMALL = {"microbatches": (4, 8), "layers": 8, "width": 8, "length": 8}


@pytest.mark.slow
def test_every_row_is_as_it_should_be_and_written(tmp_path, capsys):
    output = tmp_path / "pipeline.json"
    pipeline.run(pipeline.Config(**SMALL, output=output))
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 6 and {r["microbatches"] for r in rows} == {4, 8}
    assert all(r["sent_bytes"] == r["table_bytes"] > 0 for r in rows)
    plain = [r for r in rows if r["schedule"] != "ZB-H1"]
    assert all(r["sent_bytes"] == r["least_bytes"] for r in plain)
    assert len(capsys.readouterr().out.splitlines()) == 12 + 2 + 12


@pytest.mark.slow
def test_a_wrong_schedule_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Schedule, "bubble", lambda self: 0.5)
    c = pipeline.Config(**SMALL | {"microbatches": (4,)}, output=tmp_path / "p.json")
    with pytest.raises(SystemExit, match="6 rows are not as they should be"):
        pipeline.run(c)


def test_more_devices_than_there_are_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(pipeline.run, pipeline.Config, args=["--devices", "16"])
    assert "needs as many devices, but there are 8" in capsys.readouterr().err
