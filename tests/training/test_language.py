import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff.training.language import language_loss, nats, nats_per_token


def bigram(params, tokens):
    return params["table"][tokens]


def trained(params, tokens):
    return bigram(params, tokens), {}


PARAMS = {"table": jr.normal(jr.key(0), (11, 11))}
TOKENS = np.random.default_rng(0).integers(0, 11, 200).astype(np.uint8)


def by_hand(tokens):
    log_p = np.asarray(jax.nn.log_softmax(PARAMS["table"]))
    return -np.mean([log_p[a, b] for a, b in zip(tokens, tokens[1:], strict=False)])


def test_the_loss_is_the_mean_surprise_of_the_next_token():
    batch = jnp.asarray(TOKENS[:12][None], jnp.int32)
    loss, aux = language_loss(trained)(PARAMS, batch, jr.key(0))
    assert np.isclose(loss, by_hand(TOKENS[:12]), rtol=1e-6)
    assert aux.updates == {}


def test_nats_are_summed_in_float32_whatever_the_model_computes_in():
    logits = jr.normal(jr.key(1), (1, 4, 11), jnp.bfloat16)
    assert nats(logits, jnp.zeros((1, 4), jnp.int32)).dtype == jnp.float32


@pytest.mark.parametrize("batch_size", [1, 4, 8, 64])
def test_the_size_of_the_batches_changes_nothing(batch_size):
    # 24 windows of 8 tokens predict tokens 1 to 192, each once.
    mean = nats_per_token(bigram, PARAMS, TOKENS, 8, batch_size)
    assert np.isclose(mean, by_hand(TOKENS[:193]), rtol=1e-6)


def test_sharded_equals_unsharded():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    to = NamedSharding(mesh, P("data"))
    mean = nats_per_token(bigram, PARAMS, TOKENS, 8, 16, to=to)
    assert np.isclose(mean, by_hand(TOKENS[:193]), rtol=1e-6)


def test_a_text_shorter_than_one_window_is_an_error():
    with pytest.raises(ValueError, match="length \\+ 1 = 201 tokens .* 200 tokens"):
        nats_per_token(bigram, PARAMS, TOKENS, 200)
