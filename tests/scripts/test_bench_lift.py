import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.training.cli import main
from scripts.bench import lift

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_wrong_result_is_written_and_ends_with_status_1",
    "test_lift_is_free_and_its_leaves_compute_what_they_stand_for[mlp]",
}

SMALL = (
    lift.Case(model="mlp", options={"features": (16,)}, example=(8, 8, 1), many=4),
    lift.Case(
        model="llama",
        options={
            **{"vocab_size": 32, "d_model": 16, "hidden": 32, "n_layers": 2},
            **{"n_heads": 2, "n_kv_heads": 1, "scan": True},
        },
        example=(8,),
        tokens=True,
        many=2,
    ),
)


@pytest.mark.parametrize(
    "case",
    [SMALL[0], pytest.param(SMALL[1], marks=pytest.mark.slow)],
    ids=lambda c: c.model,
)
def test_lift_is_free_and_its_leaves_compute_what_they_stand_for(case):
    found = lift.measure(case, repeats=3, max_seconds=1.0)
    assert found["right"] and found["without_leaves"]["same_program"]
    for rows in found["with_leaves"].values():
        assert rows["dense"]["ratio"] == 1 and rows["dense"]["error"] == 0
        assert rows["int4"]["bytes"] < rows["int8"]["bytes"] < rows["dense"]["bytes"]
        # Rounded activations really were rounded.
        assert rows["w8a8"]["error"] > 1e-4
    assert found["on_dense"] == {"int8": [], "w8a8": [], "int4": []}


def test_a_function_that_lift_changes_is_found_out(monkeypatch):
    monkeypatch.setattr(lift, "lift", lambda fn: lambda p, x: fn(p, x) + 0 * x)
    found = lift.without_leaves(
        lambda p, x: p["w"] * x,
        {"w": jnp.ones(3)},
        jnp.ones(3),
        repeats=1,
        max_seconds=1.0,
    )
    assert not found["same_program"]


def test_each_turn_begins_with_another_candidate():
    order = []
    thunks = [lambda i=i: order.append(i) or jnp.zeros(()) for i in range(3)]
    seconds = lift.in_turns(thunks, repeats=2, max_seconds=1.0)
    assert order == [0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert seconds.shape == (2, 3) and np.all(seconds > 0)


def test_a_wrong_result_is_written_and_ends_with_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr(lift, "CASES", SMALL[:1])
    monkeypatch.setattr(lift, "TOLERANCE", {"w8a8": 0.0})
    path = tmp_path / "lift.json"
    args = ["--repeats", "1", "--output", str(path)]
    with pytest.raises(SystemExit) as stop:
        main(lift.run, lift.Config, args=args)
    assert stop.value.code == 1
    written = json.loads(path.read_text())
    assert written["versions"] and written["cases"][0]["right"] is False
    assert [p.name for p in Path(tmp_path).iterdir()] == ["lift.json"]
