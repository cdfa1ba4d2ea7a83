"""Keys and values in few bits."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.models import greedy_cached, init_cache, Llama, LlamaConfig
from jaxeff.quantization import (
    Codebook,
    fp8,
    int4,
    int8,
    nf4,
    quantize,
    quantize_array,
    quantize_cache,
    uint4,
    w8a8,
)
from tests.zoo import draw

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_model_decodes_as_with_a_cache_that_is_rounded_at_each_step[int8-False]",
    "test_eight_bits_compute_nearly_what_floats_do_and_take_less",
}

CONFIG = LlamaConfig(
    vocab_size=17, d_model=32, hidden=24, n_layers=2, n_heads=4, n_kv_heads=2
)
FORMATS = [int8, int4, uint4, fp8, nf4.grouped(4)]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


@by_name
def test_what_is_read_is_what_was_written_rounded(fmt, normal):
    cache = quantize_cache({"k": jnp.zeros((2, 3, 7, 2, 8))}, fmt)["k"]
    full = normal(2, 3, 7, 2, 8)
    near = quantize_array(full, fmt, (4,), (0, 1, 2, 3)).dense()
    np.testing.assert_array_equal(quantize_cache([full], fmt)[0].read(1), near[1])
    first, more = normal(3, 4, 2, 8), normal(3, 2, 2, 8)
    write = jax.jit(lambda c, x, layer, at: c.write(x, layer, at))
    cache = write(write(cache, first, 1, 0), more, jnp.int32(1), jnp.int32(4))
    want = quantize_array(
        jnp.concatenate([first, more], 1), fmt, (3,), (0, 1, 2)
    ).dense()
    np.testing.assert_array_equal(cache.read(1)[:, :6], want)
    np.testing.assert_array_equal(cache.read(1)[:, 6], 0)
    np.testing.assert_array_equal(cache.read(jnp.int32(0)), 0)
    assert cache.shape == (2, 3, 7, 2, 8)


@pytest.mark.parametrize("scan", [False, True])
@by_name
def test_a_model_decodes_as_with_a_cache_that_is_rounded_at_each_step(
    fmt, scan, getkey
):
    model = Llama(CONFIG, scan=scan)
    tokens = jr.randint(getkey(), (3, 6), 0, 17)
    variables = draw(getkey(), jax.eval_shape(model.init, getkey(), tokens))
    plain, rounded = init_cache(CONFIG, 3, 6), init_cache(CONFIG, 3, 6)
    rounded = quantize_cache(rounded, fmt)
    step = jax.jit(model.apply)

    def round_all(x):
        return quantize_array(x, fmt, (4,), (0, 1, 2, 3)).dense()

    for at in range(6):
        want, plain = step(variables, tokens[:, at : at + 1], plain)
        plain = plain._replace(k=round_all(plain.k), v=round_all(plain.v))
        got, rounded = step(variables, tokens[:, at : at + 1], rounded)
        k = np.stack([rounded.k.read(i) for i in range(2)])
        off = np.abs(k - plain.k).max() / np.abs(plain.k).max()
        # The first layer's keys do not depend on what was rounded before.
        np.testing.assert_allclose(k[0], plain.k[0], atol=1e-5)
        assert off < 0.4
        assert got.shape == want.shape and np.isfinite(got).all()


def test_eight_bits_compute_nearly_what_floats_do_and_take_less(getkey):
    model = Llama(CONFIG)
    tokens = jr.randint(getkey(), (3, 24), 0, 17)
    variables = draw(getkey(), jax.eval_shape(model.init, getkey(), tokens))
    cache = init_cache(CONFIG, 3, 34)
    small = quantize_cache(cache)
    assert tree.tree_bytes(small) < 0.4 * tree.tree_bytes(cache)  # heads of 8 only
    want, got = (model.apply(variables, tokens, c)[0] for c in (cache, small))
    off = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-5 < off < 0.02
    q_fn, q = quantize(model.apply, variables, tokens)  # and weights in 8 bits too
    run = jax.jit(greedy_cached, static_argnums=(0, 3))
    assert run(q_fn, q, tokens, 10, small).shape == (3, 34)


@pytest.mark.parametrize("fmt", [w8a8, Codebook(4), int4.tiled(2, 2), 8], ids=str)
def test_formats_that_are_no_numbers_of_tokens_are_refused(fmt):
    with pytest.raises(ValueError, match="such as int8, int4 or fp8 of .*, got"):
        quantize_cache(init_cache(CONFIG, 1, 4), fmt)


def test_what_is_no_cache_is_refused_and_groups_must_fit():
    with pytest.raises(ValueError, match="and this has none"):
        quantize_cache({"k": jnp.zeros((3, 4))})
    with pytest.raises(ValueError, match="not rounded already"):
        quantize_cache(quantize_cache(init_cache(CONFIG, 1, 4)))
    with pytest.raises(ValueError, match="a group of 3"):
        quantize_cache(init_cache(CONFIG, 1, 4), int4.grouped(3))
