import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from tests.zoo import ZOO


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_every_model_of_the_zoo_gives_finite_outputs_that_vary(case):
    fn, params, args = case.build(jr.key(0))
    y = jax.jit(fn)(params, *args)
    assert jnp.all(jnp.isfinite(y))
    assert jnp.std(y) > 0.05


def test_names_in_the_zoo_are_distinct():
    assert len({case.name for case in ZOO}) == len(ZOO)
