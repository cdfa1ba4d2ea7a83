"""Models in safetensors files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxeff import lowrank, pruning, quantization as q
from jaxeff.export import load_safetensors, save_safetensors


def fn(params, x):
    return jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]


@pytest.fixture
def given(normal):
    params = {"a": normal(16, 12), "b": normal(12), "c": normal(12, 16)}
    return params, normal(5, 16)


def chain(params, x):
    """Shrunk, then in few bits."""
    small_fn, small = pruning.shrink(fn, params, x, keep={"**": 0.5})
    return q.quantize(
        small_fn, small, x, formats={"a": q.int4, "c": q.mxfp8.grouped(6)}
    )


MADE = {
    "dense": lambda p, x: (fn, p),
    "low rank": lambda p, x: lowrank.factorize(fn, p, x, ranks=3),
    "shrunk and quantized": chain,
    "scalar": lambda p, x: (fn, {**p, "t": jnp.float32(2)}),
    "bfloat16": lambda p, x: (fn, jax.tree.map(lambda w: w.astype("bfloat16"), p)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_comes_back_as_it_was(name, given, tmp_path):
    params, x = given
    made_fn, made = MADE[name](params, x)
    save_safetensors(tmp_path / "new" / "m.safetensors", made_fn, made, {"loss": 0.5})
    like = made if name in ("bfloat16", "scalar") else params
    shapes = jax.eval_shape(lambda: like)
    again_fn, again, meta = load_safetensors(
        tmp_path / "new" / "m.safetensors", fn, shapes
    )
    assert meta == {"loss": 0.5}
    assert jax.tree.structure(again) == jax.tree.structure(made)
    for ours, theirs in zip(*map(jax.tree.leaves, (again, made)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again_fn(again, x), made_fn(made, x))
    assert not list((tmp_path / "new").glob("*.new"))


def test_any_reader_sees_codes_and_scales(given, tmp_path):
    params, x = given
    made = q.quantize(fn, params, x, formats={"a": q.int8})
    save_safetensors(tmp_path / "m", *made)
    seen = safetensors.numpy.load_file(tmp_path / "m")
    assert seen.keys() == {"a/values", "a/scale", "b", "c"}
    dense = seen["a/values"].astype(np.float32) * seen["a/scale"]
    np.testing.assert_allclose(dense, made[1]["a"].dense(), rtol=1e-6)


def test_another_model_a_damaged_file_and_another_program_are_errors(given, tmp_path):
    params, x = given
    path = tmp_path / "m"
    save_safetensors(path, fn, params)
    wide = {**params, "a": jnp.zeros((16, 13))}
    cases = [
        ({**params, "d": x}, "lacks d of this one"),
        ({"a": params["a"], "b": params["b"]}, "lacks c of it"),
        (wide, r"a is float32 \(16, 12\) in the file and float32 \(16, 13\)"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message) as e:
            load_safetensors(path, fn, other)
        assert "\n" not in str(e.value)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-3], b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"m of {len(damaged)} bytes is no whole"):
            load_safetensors(path, fn, params)
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by save_safetensors"):
        load_safetensors(path, fn, params)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "none", fn, params)


def test_what_the_format_cannot_hold_is_an_error(given, tmp_path):
    params, _ = given
    with pytest.raises(ValueError, match="b is int4: convert it"):
        save_safetensors(tmp_path / "m", fn, {**params, "b": jnp.zeros(12, jnp.int4)})
    with pytest.raises(ValueError, match="meta is anything JSON can hold, but"):
        save_safetensors(tmp_path / "m", fn, params, {"when": object()})
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_error_says_which(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install jaxeff\[export\]"):
        save_safetensors(tmp_path / "m", fn, given[0])


def test_metadata_is_json_that_names_what_was_done(given, tmp_path):
    params, x = given
    save_safetensors(tmp_path / "m", *q.quantize(fn, params, x, formats=q.int4))
    with safetensors.safe_open(tmp_path / "m", framework="np") as f:
        about = json.loads(f.metadata()["jaxeff"])
    assert about["compression"]["weights"].keys() == {"a", "c"}
