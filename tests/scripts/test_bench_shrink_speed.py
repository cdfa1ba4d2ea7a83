import json

import pytest

from scripts.bench import shrink_speed
from scripts.bench.shrink_speed import Case, Config, run

pytestmark = pytest.mark.slow
SMALL = (
    Case(model="cnn", options={"stages": ((6, 6),)}, image=(8, 8, 3), tune=True),
    Case(
        model="bert",
        options={"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 2},
        tokens=8,
    ),
)


def test_dense_and_shrunk_are_compared_as_written_and_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink_speed, "CASES", SMALL)
    found = {}
    for share, status in ((0.0, 0), (1e6, 1)):
        path = tmp_path / f"{status}.json"
        options = Config(batch_size=2, repeats=1, share=share, output=path)
        with pytest.raises(SystemExit) as stop:
            run(options)
        assert stop.value.code == status
        found = json.loads(path.read_text())
        monkeypatch.setattr(shrink_speed, "CASES", SMALL[:1])
    [row] = found["rows"]
    assert row["same"] and row["flops_ratio"] > 1.5
    assert set(row["seconds"]) == {"dense", "small", "dense, tuned", "small, tuned"}
    assert row["parameters"][0] > row["parameters"][1]
    best = lambda name: min(t[1] for n, t in row["seconds"].items() if name in n)
    assert row["speed_up"] == pytest.approx(best("dense") / best("small"))


def test_a_model_that_computes_something_else_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink_speed, "CASES", SMALL[1:])
    monkeypatch.setattr(shrink_speed, "_close", lambda a, b: False)
    options = Config(batch_size=2, repeats=1, share=0.0, output=tmp_path / "a.json")
    with pytest.raises(SystemExit) as stop:
        run(options)
    assert stop.value.code == 1
