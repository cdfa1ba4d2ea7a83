"""The benchmark of one-shot pruning, on small models."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import data
from jaxeff.models import Llama, LlamaConfig, ResNet
from scripts.bench import oneshot_pruning
from scripts.bench.oneshot_pruning import Config, METHODS, run
from scripts.bench.subjects import Pictures, Stories


@pytest.mark.slow
def test_every_method_is_measured_and_their_order_is_the_exit_status(
    monkeypatch, tmp_path, capsys
):
    train, test = data.load("digits")
    net = ResNet(depth=8, width=4)
    pictures = Pictures(
        net, jax.jit(net.init)(jr.key(0), train.images[:1]), train, test
    )
    llama = Llama(LlamaConfig(17, d_model=32, hidden=44, n_layers=1, n_heads=2))
    tokens = np.asarray(jr.randint(jr.key(1), (8, 9), 0, 17))
    weights = jax.jit(llama.init)(jr.key(2), jnp.asarray(tokens))
    stories = Stories(llama, weights, {"own": (tokens[:4], tokens[4:], tokens)})
    monkeypatch.setattr(oneshot_pruning, "resnet20", lambda data: pictures)
    monkeypatch.setattr(oneshot_pruning, "stories", lambda *options: stories)
    monkeypatch.setattr(oneshot_pruning, "SPARSITIES", (0.7, "2:4"))
    # One measure after another: the methods come in the order of METHODS.
    measured = {"perplexity": [], "accuracy": []}
    for name, found in measured.items():
        real = getattr(oneshot_pruning, name)

        def once(*args, real=real, found=found):
            found.append(real(*args))
            return found[-1]

        monkeypatch.setattr(oneshot_pruning, name, once)

    output = tmp_path / "rows.json"
    small = {"sequences": 4, "length": 8, "images": 64, "batch": 32}
    with pytest.raises(SystemExit) as stop:
        run(Config(data=tmp_path, output=output, **small))

    written = json.loads(output.read_text())
    texts, images = written["perplexity"]["own"], written["accuracy"]
    for part, name in ((texts, "perplexity"), (images, "accuracy")):
        dense, *pruned = measured[name]
        assert part["dense"] == dense and np.isfinite(dense)
        assert list(part["rows"]) == ["0.7", "2:4"]
        rows = [r[method] for r in part["rows"].values() for method in METHODS]
        assert rows == pruned
    ordered = all(
        r["sparsegpt"] <= r["wanda"] <= r["magnitude"] for r in texts["rows"].values()
    ) and all(max(r, key=r.get) == "sparsegpt" for r in images["rows"].values())
    assert stop.value.code == (not ordered)
    assert capsys.readouterr().out.count("sparsegpt") == 4
