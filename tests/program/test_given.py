"""What a calibration is given, checked before it is used."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff.program import calibrate, change_parts, check_batches, check_values, squares

X = jnp.ones((1, 4, 3))
PARAMS = {"layer": {"w": jnp.ones((3, 2))}}
SHAPES = jax.eval_shape(lambda: PARAMS)


def fn(params, x):
    return x @ params["layer"]["w"]


def test_batches_come_as_a_list_of_tuples_from_any_iterable():
    given = check_batches((X * i,) for i in range(3))
    assert isinstance(given, list) and len(given) == 3
    assert check_batches(given) == given


@pytest.mark.parametrize("batches", [[X], X, [{"x": X}], [(X,), X]], ids=repr)
def test_what_is_no_tuple_of_arguments_is_one_clear_line(batches):
    with pytest.raises(ValueError, match=r"a tuple of arguments, got a .*`\(x,\)`"):
        check_batches(batches)
    with pytest.raises(ValueError, match="got no batch: give `batches=`"):
        check_batches([])


def test_weights_need_values():
    check_values(PARAMS, "gptq")
    message = r"needs the values of the weights, but layer/w is only a shape, \(3, 2\)"
    with pytest.raises(ValueError, match=f"gptq {message}: pass arrays"):
        check_values(SHAPES, "gptq")
    some = {"weights": ["layer/w"], "update": lambda part, w, *total: w}
    with pytest.raises(ValueError, match=message):
        calibrate(fn, SHAPES, [(X,)], statistic=squares, **some)
    with pytest.raises(ValueError, match=message):
        change_parts(fn, SHAPES, X, **some)
