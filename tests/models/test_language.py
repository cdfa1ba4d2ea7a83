"""Laws that hold for every language model."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff import models
from tests.zoo import draw

CONFIG = models.LlamaConfig(
    vocab_size=17, d_model=16, hidden=24, n_layers=2, n_heads=4, n_kv_heads=2
)
MODELS = {
    "gpt": models.GPT(17, 8, d_model=16, n_layers=2, n_heads=2),
    "gpt_untied": models.GPT(17, 8, d_model=16, n_layers=2, n_heads=2, tied=False),
    "llama": models.Llama(CONFIG),
    "llama_scan": models.Llama(CONFIG, scan=True),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def _setup(model, getkey, s=7):
    tokens = jr.randint(getkey(), (2, s), 0, 17)
    return draw(getkey(), jax.eval_shape(model.init, getkey(), tokens)), tokens


@each_model
def test_a_later_token_never_changes_earlier_logits(model, getkey):
    variables, tokens = _setup(model, getkey)
    apply = jax.jit(model.apply)
    before = apply(variables, tokens)
    for t in range(1, tokens.shape[1]):
        after = apply(variables, tokens.at[:, t].set((tokens[:, t] + 1) % 17))
        assert jnp.array_equal(before[:, :t], after[:, :t])
        assert not jnp.allclose(before[:, t], after[:, t])


@each_model
def test_an_earlier_token_changes_later_logits(model, getkey):
    variables, tokens = _setup(model, getkey)
    apply = jax.jit(model.apply)
    change = apply(variables, tokens.at[:, 0].set((tokens[:, 0] + 1) % 17)) - apply(
        variables, tokens
    )
    assert jnp.all(jnp.max(jnp.abs(change), axis=-1) > 1e-4)


@each_model
def test_the_order_of_tokens_matters(model, getkey):
    variables, tokens = _setup(model, getkey)
    tokens = tokens.at[:, 0].set((tokens[:, 1] + 1) % 17)
    swapped = tokens.at[:, 0].set(tokens[:, 1]).at[:, 1].set(tokens[:, 0])
    apply = jax.jit(model.apply)
    last = apply(variables, tokens)[:, -1], apply(variables, swapped)[:, -1]
    assert not jnp.allclose(*last, atol=1e-4)


@each_model
def test_batch_rows_do_not_meet(model, getkey):
    variables, tokens = _setup(model, getkey)
    apply = jax.jit(model.apply)
    assert jnp.allclose(
        apply(variables, tokens)[1:], apply(variables, tokens[1:]), atol=1e-5
    )


@each_model
def test_in_bfloat16_parameters_stay_float32_and_logits_stay_close(model, getkey):
    variables, tokens = _setup(model, getkey)
    low = model.clone(dtype=jnp.bfloat16)
    logits = jax.jit(low.apply)(variables, tokens)
    assert logits.dtype == jnp.bfloat16
    dtypes = {
        x.dtype for x in jax.tree.leaves(jax.eval_shape(low.init, getkey(), tokens))
    }
    assert dtypes == {jnp.dtype("float32")}
    exact = jax.jit(model.apply)(variables, tokens)
    assert jnp.mean(jnp.abs(logits - exact)) < 0.05 * jnp.std(exact)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_tied_head_is_the_embedding(name, getkey):
    if name == "gpt":
        tied, untied = MODELS["gpt"], MODELS["gpt_untied"]
    else:
        config = models.LlamaConfig(17, 16, 24, 2, 4, tied=True)
        tied = models.Llama(config)
        untied = models.Llama(models.LlamaConfig(17, 16, 24, 2, 4))
    variables, tokens = _setup(tied, getkey)
    params = variables["params"]
    params = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    assert jnp.allclose(
        jax.jit(tied.apply)(variables, tokens),
        jax.jit(untied.apply)({"params": params}, tokens),
        atol=1e-6,
    )
