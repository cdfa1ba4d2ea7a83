"""The benchmark of scores and scopes, on a small model of the digits."""

import dataclasses
import json

import jax
import jax.random as jr
import numpy as np
import pytest

from jaxeff import data
from jaxeff.models import ResNet
from jaxeff.program import trace
from jaxeff.training import forms
from scripts.bench import structured_pruning
from scripts.bench.structured_pruning import (
    Config,
    mixed,
    Model,
    run,
    SCORES,
    shrink,
    smaller,
)


def flops(m):
    return trace(m.fn, m.params, m.train.images[:1]).costs.flops


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Options for a small ResNet of the digits, which was not trained."""
    train, test = data.load("digits")
    net = ResNet(depth=8, width=8)
    params = jax.jit(net.init)(jr.key(0), train.images[:1])
    fn, train_fn = forms(net, params)
    model = Model(fn, train_fn, params, train, test)
    monkeypatch.setattr(structured_pruning, "read", lambda c: model)
    monkeypatch.setattr(structured_pruning, "LOOKED_AT", 64)
    return Config(
        data_dir=tmp_path,
        load=tmp_path,
        scores=("L1",),
        scopes=("local",),
        multiple=1,
        epochs=0.1,
        batch_size=64,
        seeds=2,
        output=tmp_path / "rows.json",
    )


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_stopped(config, monkeypatch, capsys):
    measured = []
    measure = structured_pruning.measure

    def once(c, m, *row):
        measured.append(row)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(c, m, *row)

    monkeypatch.setattr(structured_pruning, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    [first] = json.loads(config.output.read_text())["rows"]
    assert 0.3 < first["flops"] <= 0.5
    run(config)
    assert measured == [("L1", "local", seed) for seed in (0, 1, 1)]
    rows = json.loads(config.output.read_text())["rows"]
    assert rows[0] == first and [r["seed"] for r in rows] == [0, 1]
    mean = (rows[0]["after"] + rows[1]["after"]) / 2
    assert f"2 seeds  FLOPs {first['flops']:.1%}" in capsys.readouterr().out
    assert f"after {mean:7.2%}" in structured_pruning.summary(rows)[0]


def test_rows_made_otherwise_are_not_mixed(config):
    found = {"options": {"budget": 0.3}, "rows": [{"score": "L1"}]}
    config.output.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="Name another --output"):
        run(config)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_every_score_shrinks_to_the_budget(config, score):
    m = structured_pruning.read(config)
    half = 0.5 * flops(m)
    for scope in ("local", "global"):
        chosen = shrink(config, m, score, scope, 0, half)
        assert flops(smaller(m, chosen)) <= half
    with pytest.raises(ValueError, match="no score 'wishes'. Choose of"):
        shrink(config, m, "wishes", "local", 0, half)


@pytest.mark.slow
def test_in_rounds_it_shrinks_and_trains_little_by_little(config, monkeypatch):
    sizes, trained = [], []
    finetune = structured_pruning.finetune

    def watched(c, m, small, epochs, seed):
        sizes.append(flops(small) / flops(m))
        trained.append(epochs)
        return finetune(c, m, small, epochs, seed)

    monkeypatch.setattr(structured_pruning, "finetune", watched)
    c = dataclasses.replace(
        config, rounds=3, round_epochs=0.05, epochs=0.2, mixup=0.5, seeds=1
    )
    run(c)
    bounds = [0.5 ** (n / 3) for n in (1, 2, 3)]
    assert all(s <= b for s, b in zip(sizes, bounds, strict=True))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.5
    assert trained == pytest.approx([0.05, 0.05, 0.1])
    [row] = json.loads(config.output.read_text())["rows"]
    assert row["flops"] == sizes[-1] and row["train_core_seconds"] > 0


def test_rounds_that_do_not_fit_in_the_epochs_are_refused(config):
    c = dataclasses.replace(config, rounds=3, round_epochs=2, epochs=3)
    with pytest.raises(ValueError, match="3 rounds of 2 epochs .* do not fit in 3"):
        run(c)


def test_a_share_of_the_images_is_mixed_with_another(normal):
    images = normal(64, 2, 2, 1)
    np.testing.assert_array_equal(mixed(jr.key(0), images, 0.0), images)
    some = np.asarray(mixed(jr.key(0), images, 0.5))
    same = (some == np.asarray(images)).all((1, 2, 3))
    assert 16 < same.sum() < 48
    # What is mixed is at least half the image itself, the rest that at the other end.
    for i in np.flatnonzero(~same):
        one, other = np.asarray(images[i]).ravel(), np.asarray(images[63 - i]).ravel()
        parts = (some[i].ravel() - other) / (one - other)
        np.testing.assert_allclose(parts, parts[0], atol=1e-3)
        assert 0.5 <= parts[0] <= 1
