import jax
import jax.numpy as jnp
import pytest

from jaxeff.models import (
    build,
    IMAGE_MODELS,
    LANGUAGE_MODELS,
    Llama,
    MASKED_MODELS,
    ResNet,
)


@pytest.mark.parametrize("name", IMAGE_MODELS + LANGUAGE_MODELS + MASKED_MODELS)
def test_every_name_builds_a_model_that_runs(name, getkey):
    if name in LANGUAGE_MODELS + MASKED_MODELS:
        model, x = build(name, vocab_size=31), jnp.zeros((2, 5), int)
        expected = (2, 5, 31)
    else:
        model, x = build(name, classes=7), jnp.zeros((2, 8, 8, 1))
        expected = (2, 7)
    y, _ = jax.eval_shape(model.init_with_output, getkey(), x)
    assert y.shape == expected


def test_options_reach_the_model():
    assert build("resnet56", width=4) == ResNet(depth=56, width=4)
    llama = build("llama", n_layers=3, n_kv_heads=None, scan=True)
    assert isinstance(llama, Llama)
    assert (llama.scan, llama.config.n_layers, llama.config.kv_heads) == (True, 3, 4)


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(ValueError, match="No model 'vgg'.* mlp, cnn, mobilenet"):
        build("vgg")


@pytest.mark.parametrize(
    "name, option, known",
    [
        ("mlp", "width", "It has features, classes"),
        ("resnet20", "depth", "It has width, classes"),
        ("llama", "config", "It has vocab_size, d_model"),
    ],
)
def test_an_unknown_option_is_refused_with_the_list(name, option, known):
    with pytest.raises(ValueError, match=f"has no option {option}. {known}"):
        build(name, **{option: 1})
