"""The benchmark of the analysis, on small models."""

import dataclasses
import json

import pytest

from jaxeff.models import LLAMA_7B
from scripts.bench import analysis


@pytest.mark.slow
def test_couplings_grow_with_the_layers_of_a_loop_and_not_with_those_of_a_scan(
    monkeypatch, tmp_path
):
    small = dataclasses.replace(LLAMA_7B, n_layers=3)
    monkeypatch.setattr(analysis, "LLAMA_70B", small)
    output = tmp_path / "rows.json"
    analysis.run(analysis.Config(layers=(2, 4, 6), repeats=1, output=output))
    rows = json.loads(output.read_text())["rows"]
    of = {(r["layers"], r["scan"]): r["couplings"] for r in rows}
    assert of[6, False] - of[4, False] == of[4, False] - of[2, False] > 0
    assert of[3, True] == of[LLAMA_7B.n_layers, True]
