import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.precision.values import Held, Number, number, yields

LOW = [jnp.bfloat16, jnp.float16]
floats = st.floats(width=32, allow_nan=False)


@given(value=floats, dtype=st.sampled_from(LOW))
def test_a_number_that_fits_stays_finite_and_keeps_its_sign(value, dtype):
    n = Number(value, ())
    low = float(n.array(dtype))
    if n.fits(dtype):
        assert np.isfinite(low) == np.isfinite(value)
        assert np.sign(low) == np.sign(value)
    else:
        assert low == 0 or np.isinf(low)
    if n.exact(dtype):
        assert low == value and n.fits(dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_exact_is_what_rounding_leaves_alone(dtype):
    exact = [0.0, -0.5, 1.0, 96.0, np.inf, -np.inf, np.nan]
    assert all(Number(v, ()).exact(dtype) for v in exact)
    assert not any(Number(v, ()).exact(dtype) for v in (0.1, 1 / 3, 4097.0))
    assert Number(-1e9, ()).fits(jnp.bfloat16) and not Number(-1e9, ()).fits(
        jnp.float16
    )
    assert not Number(float(np.finfo(np.float32).min), ()).fits(dtype)


def test_a_number_is_an_array_of_any_shape_and_dtype():
    array = Number(3.0, (2, 3)).array(jnp.bfloat16)
    assert array.shape == (2, 3) and array.dtype == jnp.bfloat16
    assert jnp.all(array == 3)
    assert Number(3.0, ()).array(jnp.float32).shape == ()


def test_numbers_and_weights_yield_and_data_does_not():
    x = jnp.ones(3)
    assert yields(Number(1.0, ())) and yields(np.float32(2)) and yields(np.int32(2))
    assert yields(Held(x, yields=True)) and not yields(Held(x)) and not yields(x)
    assert not yields(jnp.float32(2)) and not yields(np.ones(3, np.float32))
    assert number(np.float32(2)) == Number(2.0, ())
    assert number(np.int32(2)) is None and number(jnp.float32(2)) is None


def test_both_pass_through_a_pytree_whole():
    value = {"w": Held(jnp.ones(2), None, True, (3, 1)), "n": Number(2.0, (4,))}
    again = jax.tree.map(lambda x: x, value)
    assert again["n"] == value["n"]
    assert again["w"].yields and again["w"].origin == (3, 1) and again["w"].low is None
