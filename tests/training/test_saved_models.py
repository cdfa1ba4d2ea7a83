"""A compressed model comes back from disk as it was, given the model's definition."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.lowrank import factorize
from jaxeff.models import CNN, MLP
from jaxeff.precision import autocast
from jaxeff.pruning import shrink
from jaxeff.quantization import int4, int8, quantize
from jaxeff.training import load_model, save_model, save_params

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_loaded_model_equals_the_saved_one[factored_and_int4]",
    "test_a_loaded_model_equals_the_saved_one[shrunk_twice_and_int8]",
    "test_a_loaded_model_equals_the_saved_one[shrunk]",
    "test_a_loaded_model_equals_the_saved_one[quantized_in_bfloat16]",
}

X = jnp.ones((2, 8, 8, 1))


def cnn(key):
    model = CNN(stages=((8, 8), (8, 8)))
    return model.apply, model.init(key, X)


def shrunk(fn, params):
    return shrink(fn, params, X)


def shrunk_twice_and_int8(fn, params):
    fn, params = shrink(*shrink(fn, params, X), X)
    return quantize(fn, params, X, formats={"params/**/kernel": int8})


def factored_and_int4(fn, params):
    fn, params = factorize(fn, params, X, ranks={"params/conv_1_*/kernel": 2})
    return quantize(fn, params, X, formats={"params/conv_1_*/**": int4})


def quantized_in_bfloat16(fn, params):
    fn, params = quantize(fn, params, X, formats={"params/head/kernel": int8})
    return autocast(fn), params


WAYS = [shrunk, shrunk_twice_and_int8, factored_and_int4, quantized_in_bfloat16]


@pytest.mark.parametrize("compress", WAYS)
def test_a_loaded_model_equals_the_saved_one(compress, tmp_path, getkey):
    fn, params = cnn(getkey())
    small_fn, small = compress(fn, params)
    save_model(tmp_path / "m", small_fn, small, {"accuracy": 0.5})
    shapes = jax.eval_shape(lambda: params)
    loaded_fn, loaded, meta = load_model(tmp_path / "m", fn, shapes)
    assert meta == {"accuracy": 0.5}
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    assert all(map(jnp.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(small)))
    x = jr.normal(getkey(), (5, 8, 8, 1))
    assert jnp.array_equal(loaded_fn(loaded, x), small_fn(small, x))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, getkey):
    fn, params = cnn(getkey())
    small_fn, small = shrink(fn, params, X)
    save_model(tmp_path / "m", small_fn, small)
    other = MLP()
    shapes = jax.eval_shape(other.init, getkey(), X)
    with pytest.raises(ValueError, match="does not have"):
        load_model(tmp_path / "m", other.apply, shapes)


def test_bare_parameters_are_not_a_model(tmp_path, getkey):
    fn, params = cnn(getkey())
    save_params(tmp_path / "p", params)
    with pytest.raises(ValueError, match="load_params"):
        load_model(tmp_path / "p", fn, params)


def test_a_model_whose_compression_was_not_seen_says_so_when_loaded(tmp_path, getkey):
    fn, params = cnn(getkey())
    small_fn, small = shrink(fn, params, X)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="Save the function that the technique"):
        save_model(tmp_path / "m", lambda p, x: small_fn(p, x), small)
    assert not (tmp_path / "m").exists()
    held = [small_fn]  # where nobody looks
    save_model(tmp_path / "m", lambda p, x: held[0](p, x), small)
    with pytest.raises(ValueError, match="was not passed to save_model: save again"):
        load_model(tmp_path / "m", fn, shapes)
    _, loaded, _ = load_model(tmp_path / "m", small_fn, small)
    assert all(map(jnp.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(small)))
