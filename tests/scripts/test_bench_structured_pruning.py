import json

import jax
import jax.random as jr
import pytest

from jaxeff import data
from jaxeff.models import ResNet
from jaxeff.program import trace
from jaxeff.training import forms
from scripts.bench import structured_pruning
from scripts.bench.structured_pruning import Config, Model, run, SCORES, shrink


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
    x = m.train.images[:1]
    flops = lambda fn, params: trace(fn, params, x).costs.flops
    for scope in ("local", "global"):
        chosen = shrink(config, m, score, scope, 0)
        small = chosen.resize(m.fn), chosen.take(m.params)
        assert flops(*small) <= 0.5 * flops(m.fn, m.params)
    with pytest.raises(ValueError, match="no score 'wishes'. Choose of"):
        shrink(config, m, "wishes", "local", 0)
