import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization.packing import pack, packed_size, unpack

SHAPES = [((5,), -1), ((1,), 0), ((2, 3), 0), ((3, 16), -2), ((3, 9, 2), 1)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_back_what_was_packed_without_a_gap(bits):
    rng = np.random.default_rng(bits)
    xs = [rng.integers(0, 2**bits, s).astype(np.uint8) for s, _ in SHAPES]

    @jax.jit
    def run(xs):
        pairs = list(zip(xs, SHAPES, strict=True))
        packed = [pack(x, bits, a) for x, (_, a) in pairs]
        again = [
            unpack(p, bits, a, s[a]) for p, (s, a) in zip(packed, SHAPES, strict=True)
        ]
        return packed, again

    for x, (shape, axis), p, y in zip(xs, SHAPES, *run(xs), strict=True):
        np.testing.assert_array_equal(x, y)
        assert p.dtype == jnp.uint8
        assert p.shape[axis] == packed_size(shape[axis], bits)
    assert packed_size(64, bits) == 8 * bits  # 64 codes: exactly their bits


def test_the_first_code_lies_in_the_lowest_bits():
    codes = jnp.array([1, 2, 3, 4, 5, 6, 7, 0], jnp.uint8)
    number = sum(int(c) << (3 * i) for i, c in enumerate(codes))
    assert bytes(np.asarray(pack(codes, 3, 0))) == number.to_bytes(3, "little")


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("axis", [-1, -2])
def test_packing_commutes_with_slicing_leading_dims(axis, bits):
    x = np.random.default_rng(0).integers(0, 2**bits, (3, 4, 6)).astype(np.uint8)
    packed = pack(jnp.asarray(x), bits, axis)
    np.testing.assert_array_equal(packed[1], pack(jnp.asarray(x[1]), bits, axis))
    mapped = jax.vmap(lambda y: pack(y, bits, axis))(x)
    np.testing.assert_array_equal(mapped, packed)
