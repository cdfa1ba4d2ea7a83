"""A compressed model is plain data, from which its function and shapes are rebuilt."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import lift, trace, tree
from jaxeff.precision import autocast
from jaxeff.program import (
    describe,
    is_leaf,
    is_original,
    Leaf,
    like,
    rebuild,
    Rewritten,
)
from jaxeff.program.resize import Resized
from jaxeff.quantization import quantize
from tests.program.built import build, some
from tests.program.leaves import compress, Scaled
from tests.program.shrinking import distance, random_keep, shrunk

ROOT = Path(__file__).resolve().parents[2]


def through_json(fn, params):
    return json.loads(json.dumps(describe(fn, params)))


def same_shapes(a, b):
    shape = lambda x: (tuple(x.shape), jnp.dtype(x.dtype))
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.leaves(
        jax.tree.map(shape, a)
    ) == jax.tree.leaves(jax.tree.map(shape, b))


def twice(model, seed):
    """A model shrunk two times."""
    rng = np.random.default_rng(seed)
    couplings = model.program.couplings
    fn, small = shrunk(
        model.fn, model.params, couplings, random_keep(couplings, rng, 0.8)
    )
    again = trace(fn, small, *model.args).couplings
    return shrunk(fn, small, again, random_keep(again, rng, 0.8))


ANY = some(
    "linen_transformer", "linen_llama_scan", "nnx_cnn", "equinox_mlp", "plain_cnn"
)


@ANY
def test_what_was_shrunk_twice_is_rebuilt_from_json(case):
    model = build(case)
    fn, small = twice(model, 0)
    about = through_json(fn, small)
    again, shapes = rebuild(about, model.fn, jax.eval_shape(lambda: model.params))
    assert same_shapes(shapes, small)
    args = model.args
    assert np.array_equal(jax.jit(again)(small, *args), jax.jit(fn)(small, *args))
    assert through_json(again, small) == about


@some("linen_transformer", "plain_cnn")
def test_what_was_shrunk_and_compressed_is_rebuilt_with_its_leaves(case):
    model = build(case)
    fn, small = twice(model, 1)
    leaves, fn = compress(small), lift(fn)
    again, shapes = rebuild(through_json(fn, leaves), model.fn, model.params)
    assert same_shapes(shapes, leaves)
    assert sum(map(is_leaf, jax.tree.leaves(shapes, is_leaf=is_leaf))) > 2
    # Arrays read back from anywhere fill the shapes.
    arrays = [np.asarray(x) for x in jax.tree.leaves(leaves)]
    filled = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    got = jax.jit(again)(filled, *model.args)
    assert distance(got, jax.jit(fn)(leaves, *model.args)) == 0


def test_another_function_of_the_model_is_rebuilt_as_well():
    def evaluate(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def train(p, x):
        return jnp.sum(evaluate(p, x) ** 2)

    params, x = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}, jnp.ones((4, 3))
    couplings = trace(evaluate, params, x).couplings
    fn, small = shrunk(
        evaluate, params, couplings, random_keep(couplings, np.random.default_rng(0))
    )
    again, _ = rebuild(through_json(fn, small), train, params)
    assert distance(again(small, x), like(fn, train)(small, x)) == 0


def test_a_model_that_is_not_compressed_is_itself():
    fn = lambda p, x: x @ p["a"]
    params = {"a": jnp.ones((3, 8))}
    about = through_json(fn, params)
    assert about == {"rewrites": [], "weights": {}} and is_original(about)
    again, shapes = rebuild(about, fn, params)
    assert again is fn and same_shapes(shapes, params)


def test_plans_are_seen_through_jit_and_lift():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}, jnp.ones((4, 3))
    couplings = trace(fn, params, x).couplings
    small_fn, small = shrunk(
        fn, params, couplings, random_keep(couplings, np.random.default_rng(0))
    )
    assert isinstance(small_fn, Resized)
    partial = functools.partial
    for wrapped in (
        jax.jit(small_fn),
        partial(small_fn, x=x),
        jax.jit(jax.jit(small_fn)),
    ):
        assert describe(wrapped, small) == describe(small_fn, small)
    for wrapped in (lift(small_fn), lift(jax.jit(small_fn))):
        assert describe(wrapped, small) == describe(lift(small_fn), small)


def test_a_function_that_hides_a_rewritten_one_is_refused():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}, jnp.ones((4, 3))
    couplings = trace(fn, params, x).couplings
    small_fn, small = shrunk(
        fn, params, couplings, random_keep(couplings, np.random.default_rng(0))
    )
    jitted = jax.jit(lift(small_fn))

    def helper(p, x):
        return jitted(p, x)

    hiding = [
        lambda p, x: small_fn(p, x),
        lambda p, x: helper(p, x),
        lambda p, x, f=small_fn: f(p, x),
        functools.partial(lambda f, p, x: f(p, x), small_fn),
        lift(lambda p, x: small_fn(p, x)),
    ]
    for f in hiding:
        assert f(small, x).shape == (4, 2)
        with pytest.raises(ValueError, match="Resized.*Save the function that the"):
            describe(f, small)
    for f in (lambda p, x: fn(p, x), lambda p, x: lift(fn)(p, x)):
        assert describe(f, params)["rewrites"] == []


def test_a_function_and_its_params_exchanged_are_an_error():
    with pytest.raises(ValueError, match="the first is a dict. Exchange them"):
        inspect.unwrap(describe)({"a": jnp.ones(3)}, lambda p: p)


@tree.pytree
class Rich(Leaf):
    """A leaf with a field of every kind that can be described."""

    inner: Scaled
    parts: tuple[jax.Array, ...]
    nothing: None
    name: str = tree.static()
    sizes: tuple[int, ...] = tree.static()
    ratio: float = tree.static()
    flag: bool = tree.static()

    @property
    def shape(self):
        return self.inner.shape

    @property
    def dtype(self):
        return self.inner.dtype

    def dense(self):
        return self.inner + self.parts[0]  # a leaf in a leaf arrives dense


def test_every_field_of_a_leaf_survives():
    leaf = Rich(
        Scaled(jnp.ones((2, 3)), 0.25),
        (jnp.ones((2, 3)), jnp.arange(3, dtype=jnp.int8), jnp.ones(2, jnp.bfloat16)),
        None,
        "a name",
        (4, 5),
        0.5,
        True,
    )
    fn = lift(lambda p, x: x @ p["w"])
    again, shapes = rebuild(
        through_json(fn, {"w": leaf}), fn.fn, {"w": jnp.ones((2, 3))}
    )
    assert same_shapes(shapes, {"w": leaf})
    got = shapes["w"]
    assert (got.name, got.sizes, got.ratio, got.flag) == ("a name", (4, 5), 0.5, True)
    assert got.inner.factor == 0.25 and got.nothing is None
    x = jnp.ones((4, 2))
    want = x @ (leaf.inner.dense() + leaf.parts[0])
    assert distance(again({"w": leaf}, x), want) == 0


def test_a_field_that_is_no_plain_data_is_an_error():
    leaf = Rich(Scaled(jnp.ones((2, 3))), (), None, "a", {1: 2}, 0.5, True)
    with pytest.raises(ValueError, match="got a dict: store it as one of them"):
        describe(lift(lambda p: p), {"w": leaf})


def leaf_of(module, name="Gone"):
    leaf = {"leaf": name, "module": module, "fields": {}}
    return {"rewrites": [], "weights": {"w": leaf}}


@pytest.mark.parametrize("module", ["somewhere.else", "jaxeff.gone", "antigravity"])
def test_a_leaf_of_an_unknown_kind_is_an_error_that_names_its_module(module):
    before = set(sys.modules)
    with pytest.raises(ValueError, match=f"a Gone of {module}.*import {module} before"):
        rebuild(leaf_of(module), lambda p: p, {"w": jnp.ones(2)})
    assert module not in set(sys.modules) - before, "a file had code run"


def test_a_leaf_class_that_has_moved_is_found_by_its_name():
    about = through_json(lift(lambda p: p), {"w": Scaled(jnp.ones((2, 3)))})
    about["weights"]["w"]["module"] = "__main__"
    _, shapes = rebuild(about, lambda p: p, {"w": jnp.ones((2, 3))})
    assert isinstance(shapes["w"], Scaled)


REBUILD = """
import json, sys
import jax, jax.numpy as jnp
from jaxeff.program import rebuild
own = lambda p, x: x @ p["w"]
fn, params = rebuild(json.load(sys.stdin), own, {"w": jnp.ones((8, 4))})
print(type(fn).__name__, type(params["w"]).__name__, params["w"].shape)
"""


def test_a_fresh_process_needs_no_import_to_rebuild_what_jaxeff_made():
    fn, x = lambda p, x: x @ p["w"], jnp.ones((2, 8))
    q_fn, q = quantize(fn, {"w": jnp.ones((8, 4))}, x)
    said = subprocess.run(
        [sys.executable, "-c", REBUILD],
        input=json.dumps(describe(autocast(q_fn), q)),
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert said.stdout.split(maxsplit=2) == ["Autocast", "QArray", "(8, 4)\n"], said


@pytest.mark.parametrize("order", ["autocast of a lift", "a lift of autocast"])
def test_mixed_precision_and_its_place_are_rebuilt(order):
    fn, x = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], jnp.ones((4, 3))
    params = {"a": jnp.ones((3, 8)) / 3, "b": jnp.ones((8, 2))}
    leaves = {"a": params["a"], "b": Scaled(params["b"])}
    cast = lambda f: autocast(f, jnp.float16, outputs=jnp.float16)
    rewritten = cast(lift(fn)) if order.startswith("autocast") else lift(cast(fn))
    about = through_json(rewritten, leaves)
    again, _ = rebuild(about, fn, params)
    assert again == rewritten and again(leaves, x).dtype == jnp.float16
    assert np.array_equal(again(leaves, x), rewritten(leaves, x))


def test_a_rewrite_without_a_description_is_an_error():
    class Own(Rewritten):
        def __call__(self, params):
            return self.fn(params)

    with pytest.raises(ValueError, match="rewritten by Own: save the function that"):
        describe(Own(lambda p: p), {})


def test_a_checkpoint_of_another_model_is_an_error():
    about = through_json(lift(lambda p: p), {"w": Scaled(jnp.ones((2, 3)))})
    with pytest.raises(ValueError, match="compresses w, which this model does not"):
        rebuild(about, lambda p: p, {"v": jnp.ones((2, 3))})


def test_a_checkpoint_of_a_model_of_another_size_is_an_error():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}, jnp.ones((4, 3))
    couplings = trace(fn, params, x).couplings
    small = shrunk(
        fn, params, couplings, random_keep(couplings, np.random.default_rng(0))
    )
    other = {"a": jnp.ones((3, 10)), "b": jnp.ones((10, 2))}
    with pytest.raises(ValueError, match=r"a .*\(3, 8\).*\(3, 10\)"):
        rebuild(through_json(*small), fn, other)
