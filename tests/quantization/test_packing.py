import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization.packing import pack, unpack

CASES = [((5,), -1), ((1,), 0), ((2, 3), 0), ((3, 4), -2), ((3, 5, 2), 1), ((4, 1), 1)]


def test_unpacking_gives_back_what_was_packed():
    rng = np.random.default_rng(0)
    xs = [rng.integers(-8, 8, shape).astype(np.int8) for shape, _ in CASES]
    packed = jax.jit(
        lambda xs: [pack(x, a) for x, (_, a) in zip(xs, CASES, strict=True)]
    )(xs)
    for p, (shape, axis) in zip(packed, CASES, strict=True):
        assert p.dtype == jnp.uint8
        assert p.shape[axis] == (shape[axis] + 1) // 2  # half a byte each
    again = jax.jit(
        lambda ps: [unpack(p, a, s[a]) for p, (s, a) in zip(ps, CASES, strict=True)]
    )
    for x, y in zip(xs, again(packed), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_pair_of_4_bit_integers_survives():
    pairs = np.stack(np.meshgrid(*[np.arange(-8, 8)] * 2), -1).astype(np.int8)
    packed = pack(jnp.asarray(pairs), -1)
    assert len(np.unique(packed)) == 256
    np.testing.assert_array_equal(unpack(packed, -1, 2), pairs)


@pytest.mark.parametrize("axis", [-1, -2])
def test_packing_commutes_with_slicing_leading_dims(axis):
    x = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 4, 6)), jnp.int8)
    packed = pack(x, axis)
    np.testing.assert_array_equal(packed[1], pack(x[1], axis))
    np.testing.assert_array_equal(jax.vmap(lambda y: pack(y, axis))(x), packed)
