import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import lift
from jaxeff.quantization import blocks, Format, int8, Linear, quantize_array, scales

uint3 = Format(Linear(3, symmetric=False))


# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_zero_point_that_is_no_integer_leaves_less_of_most_errors",
}


def test_degenerate_blocks_have_a_step_that_says_so():
    tiny = jnp.finfo(jnp.float32).tiny
    x = jnp.array([[0, 0], [1, jnp.inf], [jnp.nan, 1], [tiny, 0], [-254, 3]])
    found = jax.jit(lambda x: scales.fit(x, int8, [1, 2]).scale)(x)
    np.testing.assert_array_equal(
        found, np.array([[1], [jnp.nan], [jnp.nan], [tiny], [2]], np.float32)
    )


def test_an_unknown_way_to_fit_is_one_clear_line():
    with pytest.raises(ValueError, match='"mse" or "hqq", or in .* got \'best\''):
        scales.fit(jnp.ones((2, 2)), int8, [2, 1], method="best")
    with pytest.raises(ValueError, match="int8 has none: choose `uint4`"):
        scales.fit(jnp.ones((2, 2)), int8, [2, 1], method="hqq")


def test_a_zero_point_that_is_no_integer_leaves_less_of_most_errors(normal):
    w = normal(64, 12) ** 3  # a few lie far out
    fit = lambda method: scales.fit(w, uint3, [16, 1], method=method)
    plain, free = fit("absmax"), fit("hqq")
    assert free.zero.dtype == jnp.float16
    off = lambda s: jnp.abs(scales.apply(w, s, uint3.grid) - w) ** 0.7
    lost = lambda s: blocks.total(off(s), [16, 1])
    assert jnp.all(lost(free) <= lost(plain) * 1.001)  # kept in 16 bits
    assert jnp.mean(lost(free) < 0.99 * lost(plain)) > 0.1
    q = quantize_array(w, uint3.grouped(16), (0,), fit="hqq")
    np.testing.assert_array_equal(q.zero, free.zero)
    x = normal(5, 64)
    ours = lift(lambda w, x: x @ w)(q, x)
    np.testing.assert_allclose(ours, x @ q.dense(), rtol=1e-4, atol=1e-4)
