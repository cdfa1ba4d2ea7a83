"""Calibration that was stopped goes on; and what it tells of each weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import pruning
from jaxeff.program import dense, Memory
from jaxeff.quantization import (
    adaround,
    awq,
    Codebook,
    fitting,
    gptq,
    int4,
    Log,
    mxfp4,
    quantize,
    uint4,
)
from tests.quantization.problems import output_error, problem

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_stopped_calibration_goes_on_to_the_same_result[gptq]",
    "test_another_run_does_not_go_on_there",
}

SHAPES = {"a": (40, 24), "b": (24, 40)}
FORMATS = {"a": uint4.grouped(8), "b": Codebook(4, dim=2)}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def stack(params, x):
    return jax.lax.scan(lambda x, p: (mlp(p, x), None), x, params)[0]


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=(3, *s)) / 5, jnp.float32)
    return {k: draw(s) for k, s in SHAPES.items()}, problem()[1]


class Stop(Exception):
    pass


def stopped_after(n, monkeypatch, run):
    """Runs until `n` parts are done, as if the machine went away then."""
    real = Memory.put
    left = [n]

    def put(self, part, arrays):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        real(self, part, arrays)

    with monkeypatch.context() as m:
        m.setattr(Memory, "put", put)
        with pytest.raises(Stop):
            run()


CASES = {
    "gptq": lambda p, x, **k: gptq(stack, p, x, batches=[(x,)], formats=FORMATS, **k),
    "scales of 8 bits": lambda p, x, **k: gptq(
        stack, p, x, batches=[(x,)], formats=mxfp4.grouped(8), **k
    ),
    "adaround": lambda p, x, **k: adaround(
        stack, p, x, batches=[(x,)], formats=int4, steps=20, **k
    ),
    "sparsegpt": lambda p, x, **k: pruning.sparsegpt(stack, p, x, batches=[(x,)], **k),
    "wanda": lambda p, x, **k: pruning.wanda(stack, p, x, batches=[(x,)], **k),
}
LONGER = ("adaround", "scales of 8 bits", "wanda")
BY_NAME = [pytest.param(n, marks=pytest.mark.slow) if n in LONGER else n for n in CASES]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_stopped_calibration_goes_on_to_the_same_result(
    name, given, tmp_path, monkeypatch
):
    run, folder = CASES[name], tmp_path / "run"
    whole = run(*given)[1]
    stopped_after(4, monkeypatch, lambda: run(*given, resume=folder))
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npz")}
    assert len(done) == 4
    log = Log()
    logs = {} if name in ("sparsegpt", "wanda") else {"log": log}
    again = run(*given, resume=folder, **logs)[1]
    assert len(log.entries) == (6 if logs else 0)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    if name == "gptq":  # codebooks are not learned again
        with monkeypatch.context() as m:
            m.setattr(fitting, "importances", None)
            jax.tree.map(
                np.testing.assert_array_equal, run(*given, resume=folder)[1], whole
            )
    assert {p: (folder / p).stat().st_mtime_ns for p in done} == done
    assert len(list(folder.glob("*.npz"))) == 6
    assert not list(folder.glob("*.new"))


def test_another_run_does_not_go_on_there(given, tmp_path):
    params, x = given
    run = lambda p, **k: gptq(
        stack, p, x, batches=[(x,)], formats=int4, resume=tmp_path / "run", **k
    )
    run(params)
    others = [({**params, "a": params["a"] + 1}, {}), (params, {"damping": 0.1})]
    for p, k in others:
        with pytest.raises(ValueError, match="other weights, data or options") as e:
            run(p, **k)
        assert "\n" not in str(e.value)
    # The same weights in another function, or another format of one that comes first.
    other = lambda p, x: stack(p, jax.nn.relu(x))
    with pytest.raises(ValueError, match="other weights, data or options"):
        gptq(other, params, x, batches=[(x,)], formats=int4, resume=tmp_path / "run")
    table = {"e": jnp.ones((9, 40)), "a": params["a"][0], "b": params["b"][0]}
    look = lambda p, ids: mlp(p, p["e"][ids])
    ids = jnp.arange(30) % 9
    for fmt in (int4, uint4):
        again = lambda fmt=fmt: gptq(
            look,
            table,
            ids,
            batches=[(ids,)],
            formats={"e": fmt, "**": int4},
            resume=tmp_path / "table",
        )
        if fmt is int4:
            again()
            continue
        with pytest.raises(ValueError, match="other weights, data or options"):
            again()
    # What was killed in its first moment is no other run.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "about.json.new").write_text("{")
    gptq(stack, params, x, batches=[(x,)], formats=int4, resume=tmp_path / "first")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no parts"):
        gptq(stack, params, x, batches=[(x,)], resume=tmp_path / "mine")


def test_the_log_lists_every_weight_with_its_errors_and_its_time():
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s) / 5, jnp.float32) for k, s in SHAPES.items()
    }
    params["table"] = jnp.asarray(rng.normal(size=(9, 40)), jnp.float32)
    look = lambda p, ids: mlp(p, p["table"][ids])
    ids = jnp.arange(60) % 9
    log = Log()
    _, q = gptq(look, params, ids, batches=[(ids,)], formats=int4, log=log)
    rows = {e.path: e for e in log.entries}
    assert list(rows) == ["table", "a", "b"]
    for path, e in rows.items():
        w, new = params[path], q[path].dense()
        off = jnp.linalg.norm(new - w) / jnp.linalg.norm(w)
        assert e.error == pytest.approx(float(off), rel=1e-4)
        assert e.format == "int4" and e.seconds > 0
    x = dense(q)["table"][ids]  # rounded first, as no data tells of it
    want = output_error(x, q["a"].dense().T, params["a"].T)
    assert rows["a"].output_error == pytest.approx(want, rel=1e-3)
    assert rows["table"].output_error is None
    text = str(log)
    assert "outputs off by" in text and f"{rows['a'].error:.2%}" in text


def test_parts_of_a_stack_are_logged_apart(given):
    params, x = given
    log = Log()
    gptq(stack, params, x, batches=[(x,)], formats=int4, log=log)
    assert [e.part for e in log.entries if e.path == "a"] == [0, 1, 2]
    assert "a[2]" in str(log)


@pytest.mark.parametrize("method", [quantize, awq])
def test_others_log_too(given, method):
    params, x = jax.tree.map(lambda p: p[0], given[0]), given[1]
    log = Log()
    relu = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    method(relu, params, x, batches=[(x,)], formats=int4, log=log)
    assert [e.path for e in log.entries] == ["a", "b"]
    assert all(0 < e.error < 0.5 for e in log.entries)
