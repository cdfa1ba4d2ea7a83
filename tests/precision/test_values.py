import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.precision.values import Held, is_wide, mark, Number, number, shared, yields

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


def test_the_gradient_of_a_rounded_array_goes_to_the_array_it_was_rounded_from():
    wide, g = jnp.linspace(-1, 1, 5), jnp.linspace(2, 3, 5).astype(jnp.bfloat16)
    low = wide.astype(jnp.bfloat16)
    y, back = jax.vjp(shared, wide, low)
    assert jnp.array_equal(y, low) and y.dtype == low.dtype
    to_wide, to_low = back(g)
    assert to_wide.dtype == wide.dtype and jnp.array_equal(to_wide, g)
    assert jnp.all(to_low == 0)


def test_only_float32_arrays_are_marked_on_their_way_into_a_loop():
    x = jnp.ones(3)
    assert mark(x, (0, 1)).origin == (0, 1)
    assert mark(Held(x, yields=True, origin=(0, 1)), (2, 0)).origin == (2, 0)
    assert mark(Held(x, yields=True), (2, 0)).yields
    others = [x.astype(jnp.bfloat16), jnp.arange(3), np.float32(2), Number(2.0, (3,))]
    for other in others:
        assert mark(other, (0, 1)) is other and not is_wide(other)
