import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff.parallelism import audit, int8_wire, make_mesh, PLAIN, ring_all_reduce


def reduced(mesh, wire=PLAIN):
    return jax.jit(
        jax.shard_map(
            lambda x: ring_all_reduce(x, "data", wire=wire),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
    )


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (100, 16)])
def test_every_device_has_the_sum_to_the_last_bit_the_same(devices, shape):
    mesh = make_mesh(devices=jax.devices()[:devices])
    x = jr.normal(jr.key(0), (devices, *shape))
    y = np.asarray(reduced(mesh)(x))
    np.testing.assert_allclose(y[0], x.sum(0), rtol=1e-5, atol=1e-6)
    assert (y == y[:1]).all()


def test_integers_are_summed_exactly():
    x = jr.randint(jr.key(0), (8, 33), -1000, 1000)
    assert (reduced(make_mesh())(x)[0] == x.sum(0)).all()


def test_it_can_be_differentiated():
    mesh, x = make_mesh(devices=jax.devices()[:4]), jr.normal(jr.key(0), (4, 10))
    ring = jax.grad(lambda x: (reduced(mesh)(x) ** 2).sum())(x)
    plain = jax.grad(lambda x: 4 * (x.sum(0) ** 2).sum())(x)
    np.testing.assert_allclose(ring, plain, rtol=1e-5)


def test_the_gradient_of_what_is_rounded_is_that_of_the_sum():
    mesh, x = make_mesh(devices=jax.devices()[:4]), jr.normal(jr.key(0), (4, 10))
    to = jr.normal(jr.key(1), x.shape)
    of = lambda wire: jax.grad(lambda x: (reduced(mesh, wire)(x) * to).sum())(x)
    np.testing.assert_allclose(of(int8_wire(8)), of(PLAIN), rtol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_it_sends_the_least_there_can_be_to_both_neighbours(devices):
    mesh, size = make_mesh(devices=jax.devices()[:devices]), 16 * devices
    x = jnp.zeros((devices, size))
    found = audit(reduced(mesh).lower(x).compile(), mesh)
    assert found.sent == 2 * (devices - 1) / devices * size * 4
    # Two ways, there for the sums and there for the results.
    assert found.of("collective-permute", "data").count == 4 * (devices - 1)


def test_in_eight_bits_it_sends_a_quarter_and_stays_near():
    mesh, size, block = make_mesh(), 2 * 8 * 256, 256
    x = jr.normal(jr.key(0), (8, size))
    run = reduced(mesh, int8_wire(block))
    y = np.asarray(run(x))
    assert (y == y[:1]).all()
    # Each of 8 roundings is off by half a step at most, of what is summed so far.
    most = np.abs(np.asarray(x)).sum(0).max() / 127 / 2
    assert np.abs(y[0] - x.sum(0)).max() <= 8 * most
    sent = audit(run.lower(x).compile(), mesh).sent
    assert sent == 2 * 7 / 8 * size * (1 + 4 / block)


def test_half_precision_is_rounded_as_float32_is():
    x = jr.normal(jr.key(0), (8, 512)).astype(jnp.bfloat16)
    y = reduced(make_mesh(), int8_wire(64))(x).astype(jnp.float32)
    want = x.astype(jnp.float32).sum(0)
    assert np.abs(y[0] - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_arrives_so_on_all(bad):
    x = jr.normal(jr.key(0), (8, 100)).at[3, 5].set(bad)
    y = reduced(make_mesh(), int8_wire(64))(x)
    assert not np.isfinite(y).all(1).any()


def test_integers_are_not_encoded():
    with pytest.raises(ValueError, match="but this is int32. Send it plain"):
        reduced(make_mesh(), int8_wire())(jnp.ones((8, 4), jnp.int32))


def test_a_block_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="1 number or more, got 0"):
        int8_wire(0)
