import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.models import GPT, greedy, greedy_cached, init_cache, Llama, LlamaConfig
from tests.zoo import draw

CONFIG = LlamaConfig(
    vocab_size=17, d_model=16, hidden=24, n_layers=2, n_heads=4, n_kv_heads=2
)


def _setup(model, getkey):
    prompt = jr.randint(getkey(), (3, 2), 0, 17)
    return draw(getkey(), jax.eval_shape(model.init, getkey(), prompt)), prompt


@pytest.mark.parametrize(
    "model",
    [Llama(CONFIG), GPT(17, 8, d_model=16, n_layers=1, n_heads=2)],
    ids=["llama", "gpt"],
)
def test_each_new_token_is_the_likeliest_after_those_before_it(model, getkey):
    variables, prompt = _setup(model, getkey)
    out = jax.jit(greedy, static_argnums=(0, 3))(model.apply, variables, prompt, 5)
    assert out.shape == (3, 7)
    assert jnp.array_equal(out[:, :2], prompt)
    best = jnp.argmax(jax.jit(model.apply)(variables, out), axis=-1)
    assert jnp.array_equal(out[:, 2:], best[:, 1:-1])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_with_a_cache_generates_the_same(scan, steps, getkey):
    model = Llama(CONFIG, scan=scan)
    variables, prompt = _setup(model, getkey)
    cache = init_cache(CONFIG, batch=3, length=7)
    cached = jax.jit(greedy_cached, static_argnums=(0, 3))(
        model.apply, variables, prompt, steps, cache
    )
    whole = jax.jit(greedy, static_argnums=(0, 3))(
        model.apply, variables, prompt, steps
    )
    assert jnp.array_equal(cached, whole)


def test_a_cache_that_is_too_short_is_refused(getkey):
    model = Llama(CONFIG)
    variables, prompt = _setup(model, getkey)
    with pytest.raises(ValueError, match="need a cache of 7, got 6"):
        greedy_cached(model.apply, variables, prompt, 6, init_cache(CONFIG, 3, 6))
    with pytest.raises(ValueError, match="there are 3, and it was made for 2"):
        greedy_cached(model.apply, variables, prompt, 6, init_cache(CONFIG, 2, 9))


def test_models_without_a_cache_are_named():
    with pytest.raises(ValueError, match="cached for LLaMA, got a GPT: give"):
        init_cache(GPT(n_layers=1), 2, 8)


@pytest.mark.parametrize("length, steps", [(0, 3), (2, -1)])
def test_an_empty_prompt_or_negative_steps_are_refused(length, steps):
    prompt = jnp.zeros((1, length), int)
    with pytest.raises(ValueError, match=f"got {length} and {steps}"):
        greedy(lambda params, tokens: tokens, {}, prompt, steps)
