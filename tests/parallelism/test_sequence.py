import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff.parallelism import (
    all_to_all_attention,
    audit,
    make_mesh,
    ring_attention,
)

BATCH, LENGTH, DIM = 2, 32, 8
WAYS = {"ring": ring_attention, "all to all": all_to_all_attention}


def problem(heads=8, kv=8, dtype=jnp.float32):
    keys = jr.split(jr.key(0), 3)
    shape = lambda h: (BATCH, LENGTH, h, DIM)
    q, k, v = (
        jr.normal(key, shape(h), dtype)
        for key, h in zip(keys, (heads, kv, kv), strict=True)
    )
    return q, k, v


def spread(way, devices, check_vma=False, **options):
    mesh = make_mesh(sequence=devices, data=1, devices=jax.devices()[:devices])
    return mesh, jax.jit(
        jax.shard_map(
            lambda q, k, v: way(q, k, v, "sequence", **options),
            mesh=mesh,
            in_specs=P(None, "sequence"),
            out_specs=P(None, "sequence"),
            check_vma=check_vma,
        )
    )


def whole(q, k, v, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_value_and_gradient_are_those_of_the_whole_sequence(way, devices, causal):
    q, k, v = problem()
    _, run = spread(way, devices, causal=causal)
    grads = lambda fn: jax.grad(lambda *of: jnp.sin(fn(*of)).sum(), (0, 1, 2))(q, k, v)
    np.testing.assert_allclose(run(q, k, v), whole(q, k, v, causal), atol=2e-6)
    of_whole = grads(lambda q, k, v: whole(q, k, v, causal))
    for a, b in zip(grads(run), of_whole, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_heads_of_keys_serve_several_of_queries(way):
    q, k, v = problem(heads=8, kv=2)
    _, run = spread(way, 2)
    np.testing.assert_allclose(run(q, k, v), whole(q, k, v, True), atol=2e-6)
    loss = lambda fn: lambda k: jnp.sin(fn(q, k, v)).sum()
    want = jax.grad(loss(lambda q, k, v: whole(q, k, v, True)))(k)
    np.testing.assert_allclose(jax.grad(loss(run))(k), want, atol=5e-6)


def test_half_precision_sums_in_float32():
    q, k, v = problem(dtype=jnp.bfloat16)
    _, run = spread(ring_attention, 4)
    got = run(q, k, v)
    assert got.dtype == jnp.bfloat16
    want = whole(*(x.astype(jnp.float32) for x in (q, k, v)), True)
    # A rounding of the result, half a unit of its last place.
    assert np.abs(got.astype(jnp.float32) - want).max() <= 2**-8 * np.abs(want).max()


def test_large_scores_overflow_nowhere():
    q, k, v = problem()
    _, run = spread(ring_attention, 4)
    got = run(100 * q, 100 * k, v)
    np.testing.assert_allclose(got, whole(100 * q, 100 * k, v, True), atol=1e-4)


def test_the_scale_is_the_callers():
    q, k, v = problem()
    want = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.1)
    for way in WAYS.values():
        np.testing.assert_allclose(
            spread(way, 4, scale=0.1)[1](q, k, v), want, atol=2e-6
        )


def test_a_scale_may_be_computed_and_have_a_gradient():
    q, k, v = problem(heads=2, kv=2)
    loss = lambda way: jax.grad(lambda scale: jnp.sin(way(scale)).sum())(0.3)
    of_ring = loss(lambda scale: spread(ring_attention, 4, scale=scale)[1](q, k, v))
    of_whole = loss(
        lambda scale: jax.nn.dot_product_attention(
            q * scale, k, v, is_causal=True, scale=1.0
        )
    )
    np.testing.assert_allclose(of_ring, of_whole, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_jax_may_keep_account_of_what_differs_between_devices(causal):
    of = problem(heads=2, kv=1)
    grads = lambda run: jax.grad(lambda *of: jnp.sin(run(*of)).sum(), (0, 1, 2))(*of)
    _, plain = spread(ring_attention, 4, causal=causal)
    _, checked = spread(ring_attention, 4, check_vma=True, causal=causal)
    for a, b in zip(grads(checked), grads(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_keys_may_be_others_than_those_of_the_queries():
    q, k, v = problem(heads=2, kv=2)
    k, v = k[:, : LENGTH // 2], v[:, : LENGTH // 2, :, :4]
    _, run = spread(ring_attention, 4, causal=False)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    want = jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(run(q, k, v), want, atol=2e-6)
    with pytest.raises(ValueError, match="8 queries and 4 keys. Give as many"):
        spread(ring_attention, 4)[1](q, k, v)
    with pytest.raises(ValueError, match="there is a value for each key"):
        run(q, k, v[:, :8])


def test_around_the_ring_go_keys_and_values_and_back_their_gradients():
    n, (q, k, v) = 4, problem()
    mesh, run = spread(ring_attention, n)
    part = k.nbytes // n
    ahead = audit(run.lower(q, k, v).compile(), mesh)
    assert ahead.of("collective-permute", "sequence").bytes == 2 * (n - 1) * part
    both = jax.jit(jax.grad(lambda *of: run(*of).sum(), (0, 1, 2)))
    found = audit(both.lower(q, k, v).compile(), mesh)
    # Keys and values twice, their gradients once, with the hop home.
    assert found.bytes == (2 * 2 * (n - 1) + 2 * n) * part
    assert {c.kind for c in found.collectives} == {"collective-permute"}


def test_all_to_all_sends_each_array_once():
    n, (q, k, v) = 4, problem()
    mesh, run = spread(all_to_all_attention, n)
    found = audit(run.lower(q, k, v).compile(), mesh)
    assert found.of("all-to-all", "sequence").bytes == 4 * q.nbytes // n


def test_memory_of_the_ring_does_not_grow_with_the_square_of_the_length():
    def temp(length):
        mesh, run = spread(ring_attention, 8)
        shape = jax.ShapeDtypeStruct((1, length, 1, DIM), jnp.float32)
        loss = jax.jit(jax.grad(lambda *of: run(*of).sum(), (0, 1, 2)))
        memory = loss.lower(shape, shape, shape).compile().memory_analysis()
        return memory.temp_size_in_bytes

    scores = (1024 // 8) ** 2 * 4
    # A few blocks of scores at a time, and not one for each of the 8 steps.
    assert temp(1024) < 6 * scores + 64 * 1024 // 8 * DIM * 4


@pytest.mark.parametrize(
    ("way", "heads", "said"),
    [
        (ring_attention, (8, 3), "8 is no multiple of 3"),
        (all_to_all_attention, (8, 2), "do not both divide by the 4 devices"),
    ],
)
def test_heads_that_do_not_divide_are_an_error(way, heads, said):
    _, run = spread(way, 4)
    with pytest.raises(ValueError, match=said):
        run(*problem(*heads))
