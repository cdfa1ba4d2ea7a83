"""All that follows works on a shrunk model: it is a function like any other."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff import trace
from jaxeff.program import describe, keep_indices, rebuild, zero_indices
from jaxeff.quantization import quantize
from tests.architectures import ARCHITECTURES
from tests.program.shrinking import distance, random_keep, shrunk

QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)
CASES = {a.case.name: a.case for a in ARCHITECTURES}


class Model:
    """An architecture, and a shrunk and a masked version of it."""

    def __init__(self, name: str):
        self.fn, params, args = CASES[name].build(jr.key(1))
        self.params, self.args = jax.tree.map(np.asarray, params), args
        self.couplings = trace(self.fn, self.params, *self.args).couplings
        self.keep = random_keep(self.couplings, np.random.default_rng(1))
        made = shrunk(self.fn, self.params, self.couplings, self.keep)
        self.small_fn, self.small = made
        self.masked = zero_indices(self.params, self.couplings, self.keep)

    @functools.cached_property
    def result(self):
        """Of the shrunk model on its inputs."""
        return jit(self.small_fn)(self.small, *self.args)


model = functools.cache(Model)


def some(*names, slow=()):
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("name", [*names, *slow])


SOME = some(
    "plain_resnext",
    "equinox_gru",
    slow=("linen_gpt2", "linen_vit", "linen_shufflenet_v2", "nnx_llama"),
)


@some("linen_gpt2", "equinox_gru", slow=("linen_bert", "nnx_llama", "linen_lstm"))
def test_batch_and_sequence_stay_free(name):
    m = model(name)
    for shape in [(1, 3), (5, 7)]:
        words = np.random.default_rng(0).integers(0, 17, shape)
        want = jit(m.fn)(m.masked, words)
        assert distance(jit(m.small_fn)(m.small, words), want) < 1e-5


@some("linen_vgg", "nnx_unet")
def test_batch_stays_free_of_images(name):
    m = model(name)
    images = np.random.default_rng(0).normal(size=(5, *m.args[0].shape[1:]))
    images = images.astype(np.float32)
    want = jit(m.fn)(m.masked, images)
    assert distance(jit(m.small_fn)(m.small, images), want) < 1e-5


def test_an_image_of_another_size_is_taken_where_the_model_takes_it():
    m = model("nnx_unet")
    images = np.random.default_rng(0).normal(size=(2, 16, 12, 3)).astype(np.float32)
    want = jit(m.fn)(m.masked, images)
    assert distance(jit(m.small_fn)(m.small, images), want) < 1e-5


@SOME
def test_gradients_are_those_of_the_masked_model(name):
    m = model(name)
    loss = lambda fn: lambda params: jnp.mean(jnp.sin(fn(params, *m.args)))
    want = keep_indices(jit(jax.grad(loss(m.fn)))(m.masked), m.couplings, m.keep)
    assert distance(jit(jax.grad(loss(m.small_fn)))(m.small), want) < 1e-4


@SOME
def test_a_shrunk_model_can_be_mapped_and_shrunk_again(name):
    m = model(name)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), m.args)
    mapped = jit(jax.vmap(m.small_fn, (None, *[0] * len(m.args))))(m.small, *stacked)
    assert distance(mapped[0], m.result) < 1e-5
    again = trace(m.small_fn, m.small, *m.args).couplings
    keep = random_keep(again, np.random.default_rng(2))
    smaller_fn, smaller = shrunk(m.small_fn, m.small, again, keep)
    want = jit(m.small_fn)(zero_indices(m.small, again, keep), *m.args)
    assert distance(jit(smaller_fn)(smaller, *m.args), want) < 1e-5


@SOME
def test_a_shrunk_model_can_be_quantized_and_rebuilt_from_json(name):
    m = model(name)
    fn, params = quantize(m.small_fn, m.small, *m.args)
    got = jit(fn)(params, *m.args)
    # int8 weights: a rounding error of at most 1 / 254 of each row's largest.
    assert 0 < distance(got, m.result) < 0.1
    about = json.loads(json.dumps(describe(fn, params)))
    shapes = jax.eval_shape(lambda: m.params)
    again_fn, again = rebuild(about, m.fn, shapes)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    filled = jax.tree.unflatten(jax.tree.structure(again), jax.tree.leaves(params))
    assert jnp.array_equal(jit(again_fn)(filled, *m.args), got)


@SOME
def test_a_shrunk_model_can_be_exported(name):
    m = model(name)
    leaves, structure = jax.tree.flatten(m.small)
    flat = lambda leaves, *args: m.small_fn(
        jax.tree.unflatten(structure, leaves), *args
    )
    shapes = jax.eval_shape(lambda: (leaves, *m.args))
    exported = export.export(jax.jit(flat))(*shapes)
    if importlib.util.find_spec("flatbuffers"):  # which JAX writes bytes with
        exported = export.deserialize(exported.serialize())
    assert distance(exported.call(leaves, *m.args), m.result) < 1e-5


@some("equinox_gru", slow=("linen_vit", "linen_shufflenet_v2", "nnx_llama"))
def test_a_shrunk_model_runs_sharded_over_all_devices(name):
    m = model(name)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))

    def weight(x):
        fits = x.ndim > 0 and x.shape[-1] % 4 == 0
        return place(x, *[None] * (x.ndim - 1), "model") if fits else place(x)

    weights = jax.tree.map(weight, m.small)
    assert any(not w.sharding.is_fully_replicated for w in jax.tree.leaves(weights))
    args = [place(x, "data") for x in m.args]
    got = jax.jit(m.small_fn)(weights, *args)
    assert len(got.sharding.device_set) == 8
    assert distance(got, m.result) < 1e-5
