import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from hypothesis import given, strategies as st

from jaxeff.models import (
    init_cache,
    Llama,
    LLAMA_1B,
    LLAMA_7B,
    LlamaConfig,
    rope_tables,
    rotate,
    stack_layers,
    STORIES260K,
    unstack_layers,
)
from tests.zoo import draw

CONFIG = LlamaConfig(
    vocab_size=17, d_model=16, hidden=24, n_layers=2, n_heads=4, n_kv_heads=2
)
each_pairing = pytest.mark.parametrize("pairs", ["adjacent", "half"])


def _setup(model, getkey, s=7):
    tokens = jr.randint(getkey(), (2, s), 0, 17)
    return draw(getkey(), jax.eval_shape(model.init, getkey(), tokens)), tokens


def _loss(model, tokens):
    def loss(variables):
        logits = model.apply(variables, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return loss


# 7B: Touvron et al. 2023. stories260k: its documented size.
@pytest.mark.parametrize(
    "config, count",
    [(LLAMA_7B, 6_738_415_616), (STORIES260K, 260_032), (LLAMA_1B, 1_104_218_112)],
)
def test_a_named_configuration_has_its_parameters(config, count):
    tokens = jnp.zeros((1, 2), int)
    shapes = jax.eval_shape(Llama(config, scan=True).init, jr.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("remat", [False, True])
def test_scan_equals_loop_in_value_and_gradient(remat, getkey):
    loop, scan = Llama(CONFIG), Llama(CONFIG, scan=True, remat=remat)
    variables, tokens = _setup(loop, getkey)
    stacked = stack_layers(variables)
    a, grad_a = jax.jit(jax.value_and_grad(_loss(loop, tokens)))(variables)
    b, grad_b = jax.jit(jax.value_and_grad(_loss(scan, tokens)))(stacked)
    assert jnp.allclose(a, b, atol=1e-6)
    for x, y in zip(
        jax.tree.leaves(stack_layers(grad_a)), jax.tree.leaves(grad_b), strict=True
    ):
        assert jnp.allclose(x, y, atol=1e-5)


def test_stacked_variables_have_the_scanned_models_shapes_and_unstack_again(getkey):
    variables, tokens = _setup(Llama(CONFIG), getkey)
    stacked = stack_layers(variables)
    expected = jax.eval_shape(Llama(CONFIG, scan=True).init, getkey(), tokens)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, expected)
    again = unstack_layers(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, variables))


def test_rematerialised_equals_plain_in_gradient(getkey):
    plain, remat = Llama(CONFIG), Llama(CONFIG, remat=True)
    variables, tokens = _setup(plain, getkey)
    a = jax.jit(jax.grad(_loss(plain, tokens)))(variables)
    b = jax.jit(jax.grad(_loss(remat, tokens)))(variables)
    close = jax.tree.map(lambda x, y: jnp.allclose(x, y, atol=1e-6), a, b)
    assert jax.tree.all(close)


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_grouped_queries_equal_full_attention_with_repeated_heads(n_kv_heads, getkey):
    grouped = dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)
    full = dataclasses.replace(CONFIG, n_kv_heads=None)
    variables, tokens = _setup(Llama(grouped), getkey)

    def repeat(path, leaf):
        if path[-2].key not in ("k", "v"):
            return leaf
        heads = leaf.reshape(leaf.shape[0], n_kv_heads, grouped.head_dim)
        return jnp.repeat(heads, 4 // n_kv_heads, axis=1).reshape(leaf.shape[0], -1)

    repeated = jax.tree_util.tree_map_with_path(repeat, variables)
    assert jnp.allclose(
        jax.jit(Llama(grouped).apply)(variables, tokens),
        jax.jit(Llama(full).apply)(repeated, tokens),
        atol=1e-5,
    )


@given(
    query=st.integers(0, 500),
    key=st.integers(0, 500),
    shift=st.integers(0, 500),
    pairs=st.sampled_from(["adjacent", "half"]),
)
def test_rotated_products_depend_on_the_distance_only(query, key, shift, pairs):
    q, k = jr.normal(jr.key(0), (1, 1, 2, 8)), jr.normal(jr.key(1), (1, 1, 2, 8))

    def product(query, key):
        a = rotate(q, *rope_tables(jnp.array([query]), 8), pairs=pairs)
        b = rotate(k, *rope_tables(jnp.array([key]), 8), pairs=pairs)
        return jnp.sum(a * b, axis=-1)

    moved = product(query + shift, key + shift)
    # An angle near 1000 radians is known to 1e-4 in float32.
    assert jnp.allclose(product(query, key), moved, atol=2e-3)


@each_pairing
def test_rotation_keeps_lengths_and_leaves_position_zero_alone(pairs, getkey):
    x = jr.normal(getkey(), (2, 5, 3, 8))
    y = rotate(x, *rope_tables(jnp.arange(5), 8), pairs=pairs)
    assert jnp.allclose(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1))
    assert jnp.array_equal(x[:, 0], y[:, 0])


@each_pairing
def test_each_pair_turns_by_its_own_frequency(pairs):
    head_dim, position, theta = 6, 3, 100.0
    for i in range(head_dim // 2):
        a, b = (2 * i, 2 * i + 1) if pairs == "adjacent" else (i, i + head_dim // 2)
        x = jnp.zeros((1, 1, 1, head_dim)).at[..., a].set(1.0)
        tables = rope_tables(jnp.array([position]), head_dim, theta)
        y = rotate(x, *tables, pairs=pairs)[0, 0, 0]
        angle = position * theta ** (-2 * i / head_dim)
        expected = jnp.zeros(head_dim).at[a].set(jnp.cos(angle))
        assert jnp.allclose(y, expected.at[b].set(jnp.sin(angle)), atol=1e-6)


def test_the_two_pairings_differ_by_the_order_of_a_heads_dims(getkey):
    adjacent = Llama(CONFIG)
    half = Llama(dataclasses.replace(CONFIG, rope="half"))
    variables, tokens = _setup(adjacent, getkey)

    def reorder(path, leaf):
        if path[-2].key not in ("q", "k"):
            return leaf
        pairs = leaf.reshape(leaf.shape[0], -1, CONFIG.head_dim // 2, 2)
        return pairs.swapaxes(-1, -2).reshape(leaf.shape)

    reordered = jax.tree_util.tree_map_with_path(reorder, variables)
    assert jnp.allclose(
        jax.jit(adjacent.apply)(variables, tokens),
        jax.jit(half.apply)(reordered, tokens),
        atol=1e-5,
    )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (4, 1, 2)])
def test_with_a_cache_any_chunks_give_the_logits_of_the_whole(scan, chunks, getkey):
    model = Llama(CONFIG, scan=scan)
    variables, tokens = _setup(model, getkey)
    cache = init_cache(CONFIG, batch=2, length=9)
    apply = jax.jit(model.apply)
    parts, at = [], 0
    for n in chunks:
        logits, cache = apply(variables, tokens[:, at : at + n], cache)
        parts.append(logits)
        at += n
    assert cache.used == 7
    whole = apply(variables, tokens)
    assert jnp.allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_a_cache_without_room_gives_nan_and_never_a_wrong_answer(getkey):
    model = Llama(CONFIG)
    variables, tokens = _setup(model, getkey)
    apply = jax.jit(model.apply)
    logits, cache = apply(variables, tokens[:, :4], init_cache(CONFIG, 2, 6))
    assert jnp.all(jnp.isfinite(logits))
    logits, _ = apply(variables, tokens[:, 4:], cache)
    assert jnp.all(jnp.isnan(logits))
    with pytest.raises(ValueError, match="all 7 tokens of a call, got room for 6"):
        model.apply(variables, tokens, init_cache(CONFIG, 2, 6))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_heads": 5}, "whole, even number, got 16 / 5"),
        ({"n_heads": 16}, "whole, even number, got 16 / 16"),
        ({"n_kv_heads": 3}, "must divide n_heads, got 3 and 4"),
    ],
)
def test_heads_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **sizes)
