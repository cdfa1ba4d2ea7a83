import json

import jax
import pytest

from jaxeff.training.cli import main
from scripts.bench import gradient_compression as compression

SMALL = {
    "steps": 3,
    "batch_size": 8,
    "length": 8,
    "d_model": 16,
    "n_layers": 1,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 117)) * 30)
    return path


@pytest.mark.slow
def test_it_trains_compares_writes_and_goes_on(text, tmp_path, capsys):
    output = tmp_path / "compression.json"
    c = compression.Config(**SMALL, data=text, ways=("8 bits",), output=output)
    compression.run(c)
    rows = json.loads(output.read_text())["rows"]
    assert [r["way"] for r in rows] == ["in full", "8 bits"]
    assert all(r["sent"] == pytest.approx(r["said"]) for r in rows)
    assert rows[0]["sent"] > rows[1]["sent"]
    capsys.readouterr()
    compression.run(c)
    said = capsys.readouterr().out
    assert "step 1" not in said and len(said.splitlines()) == 4
    with pytest.raises(SystemExit):
        other = ["--data", str(text), "--output", str(output), "--steps", "4"]
        main(compression.run, compression.Config, args=other)
    assert "Name another --output" in capsys.readouterr().err


def test_an_unknown_way_is_an_error(text):
    c = compression.Config(data=text, ways=("2 bits",))
    with pytest.raises(ValueError, match="no way '2 bits'. Choose of: in full, 8 bits"):
        compression.run(c)


def test_one_device_is_an_error(text, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="one device sends nothing"):
        compression.run(compression.Config(data=text))
