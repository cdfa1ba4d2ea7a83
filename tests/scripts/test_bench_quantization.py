"""The benchmarks of quantization, on small models."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import data, quantization as q
from jaxeff.models import Llama, LlamaConfig, ResNet
from scripts.bench import gptq, quantization
from scripts.bench.quantization import Config, run
from scripts.bench.subjects import Pictures, Stories


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Both subjects in small, a format for each, and every kind of algorithm."""
    train, test = data.load("digits")
    net = ResNet(depth=8, width=4)
    params = jax.jit(net.init)(jr.key(0), train.images[:1])
    pictures = Pictures(net, params, train, test)
    llama = Llama(LlamaConfig(17, d_model=32, hidden=43, n_layers=1, n_heads=2))
    tokens = np.asarray(jr.randint(jr.key(1), (24, 9), 0, 17))
    weights = jax.jit(llama.init)(jr.key(2), jnp.asarray(tokens))
    stories = Stories(llama, weights, {"own": (tokens[:4], tokens[4:8], tokens)})
    monkeypatch.setattr(quantization, "resnet20", lambda data: pictures)
    monkeypatch.setattr(quantization, "stories", lambda *options: stories)
    rows = {q.int4: ("nearest", "GPTQ"), q.Codebook(4, dim=2): ("GPTQ",)}
    monkeypatch.setattr(quantization, "PICTURES", rows)
    monkeypatch.setattr(quantization, "TRAINED", {q.int3: ("QAT",)})
    texts = {q.int4.grouped(32): ("nearest", "QAT"), q.w8a8: quantization.MOVED}
    monkeypatch.setattr(quantization, "TEXTS", texts)
    monkeypatch.setattr(quantization, "CACHES", (q.int8,))
    return Config(
        data=tmp_path,
        images=64,
        batch=32,
        sequences=4,
        length=8,
        epochs=0.1,
        text_steps=2,
        output=tmp_path / "new" / "rows.json",
    )


@pytest.mark.slow
def test_it_writes_every_row_and_goes_on_where_it_stopped(config, monkeypatch, capsys):
    measured, add = [], quantization.Table.add

    def once(self, *row):
        measured.append(row[1:3])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return add(self, *row)

    monkeypatch.setattr(quantization.Table, "add", once)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert len(json.loads(config.output.read_text())["rows"]) == 2
    run(config)
    rows = json.loads(config.output.read_text())["rows"]
    found = [(r["subject"], r["format"], r["algorithm"]) for r in rows]
    assert found == [
        ("resnet20", "float32", ""),
        ("resnet20", "int4", "nearest"),
        ("resnet20", "int4", "GPTQ"),
        ("resnet20", "codebook4x2", "GPTQ"),
        ("resnet20", "int3", "QAT"),
        ("own", "float32", ""),
        ("own", "int4 groups of 32", "nearest"),
        ("own", "int4 groups of 32", "QAT"),
        ("own", "w8a8", "SmoothQuant"),
        ("own", "w8a8", "rotated"),
        ("own", "int8", "keys and values"),
    ]
    assert all(np.isfinite(r["score"]) and r["bytes"] > 0 for r in rows)
    assert rows[1]["bits"] < 0.3 * rows[0]["bits"]
    assert "int3" in capsys.readouterr().out


def test_rows_made_otherwise_are_not_mixed(config):
    config.output.parent.mkdir()
    found = {"options": {"images": 3}, "rows": []}
    config.output.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="Name another --output"):
        run(config)


@pytest.mark.slow
def test_gptq_on_one_matrix(tmp_path, capsys):
    path = tmp_path / "gptq.json"
    gptq.run(gptq.Config(size=128, inputs=256, columns=(128,), repeats=2, output=path))
    methods = json.loads(path.read_text())["methods"]
    ours = [m["of nearest"] for name, m in methods.items() if name != "nearest"]
    assert len(ours) == 2 and max(ours) < 1
    assert "128 columns: compiled in" in capsys.readouterr().out
