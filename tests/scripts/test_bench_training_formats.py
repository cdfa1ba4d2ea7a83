import json

import pytest

from scripts.bench import training_formats as formats

SMALL = {"steps": 3, "batch_size": 8, "length": 8, "d_model": 64, "n_layers": 1}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 117)) * 30)
    return path


@pytest.mark.slow
def test_it_trains_compares_writes_and_goes_on(text, tmp_path, capsys):
    output = tmp_path / "formats.json"
    both = "int8 products, states in 8 bits"
    c = formats.Config(**SMALL, data=text, ways=(both,), output=output)
    formats.run(c)
    plain, small = json.loads(output.read_text())["rows"]
    assert (plain["way"], small["way"]) == (formats.FLOAT32, both)
    assert small["state bytes"] < plain["state bytes"] / 2
    assert small["loss"] == pytest.approx(plain["loss"], rel=0.05)
    assert small["loss"] != plain["loss"]
    capsys.readouterr()
    formats.run(c)
    said = capsys.readouterr().out
    assert "step 1" not in said and len(said.splitlines()) == 4


def test_an_unknown_way_is_an_error(text):
    c = formats.Config(data=text, ways=("int7",))
    with pytest.raises(ValueError, match="no way 'int7'. Choose of: float32, bfloat16"):
        formats.run(c)
