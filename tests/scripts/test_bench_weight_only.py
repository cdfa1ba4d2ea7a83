"""The benchmark of products, on small ones."""

import json

from scripts.bench import weight_only

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_it_measures_checks_and_writes",
}


def test_it_measures_checks_and_writes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "weight_only.json"
    c = weight_only.Config(width=64, hidden=256, rows=(1, 3), repeats=3, output=path)
    monkeypatch.setattr(weight_only, "FORMATS", weight_only.FORMATS[:1])
    weight_only.run(c)
    found = json.loads(path.read_text())
    assert [r["rows"] for r in found["rows"]] == [1, 3]
    for r in found["rows"]:
        assert set(r["seconds"]) == {"float32", "quantized", "tuned"}
        assert max(r["off"].values()) < weight_only.WORST and len(r["forms"]) == 2
    assert capsys.readouterr().out.count("tuned / float32") == 2
