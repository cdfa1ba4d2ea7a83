import json

import jax
import jax.numpy as jnp
import pytest

from jaxeff.pruning import one_shot, prune
from jaxeff.training.cli import main
from scripts.bench import masks


@pytest.mark.slow
def test_it_measures_cost_and_accuracy_and_writes_both(tmp_path):
    args = ["--turns", "1", "--layers", "1", "--steps", "60", "--seeds", "1"]
    args += ["--sparsities", "0.9", "--output", str(tmp_path / "masks.json")]
    with pytest.raises(SystemExit) as stopped:
        main(masks.run, masks.Config, args=args)
    assert stopped.value.code == 0
    found = json.loads((tmp_path / "masks.json").read_text())
    assert set(found["cost"]["ways"]) == set(masks.cost_ways())
    assert all(way["seconds"] > 0 for way in found["cost"]["ways"].values())
    assert [row["way"] for row in found["accuracy"]] == [
        "dense",
        *masks.training_ways(0.9, 60),
    ]
    for row in found["accuracy"]:
        assert row["exact"] and 0.3 < row["accuracy"] <= 1


def test_a_wrong_number_of_weights_or_a_weight_that_lives_is_seen():
    params = {"w": jnp.arange(1.0, 41.0).reshape(4, 10)}
    tx = prune(masks.adam_of(10), one_shot(0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    assert masks.check(params, state, 0.5) == (20, False)
    params = jax.tree.map(jnp.add, params, updates)
    assert masks.check(params, state, 0.5) == (20, True)
    assert masks.check(params, state, 0.9) == (20, False)
