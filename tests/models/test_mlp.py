import jax
import jax.numpy as jnp
import jax.random as jr

from jaxeff.models import MLP


def test_it_is_dense_layers_with_relu_between(getkey):
    model = MLP(features=(7, 6), classes=3)
    x = jr.normal(getkey(), (4, 5))
    params = model.init(getkey(), x)["params"]
    assert sorted(params) == ["dense_0", "dense_1", "head"]
    y = x
    for name in ("dense_0", "dense_1"):
        y = jax.nn.relu(y @ params[name]["kernel"] + params[name]["bias"][None])
    y = y @ params["head"]["kernel"] + params["head"]["bias"][None]
    assert jnp.allclose(model.apply({"params": params}, x), y, atol=1e-6)


def test_the_shape_of_an_example_does_not_matter(getkey):
    model = MLP(features=(7,), classes=3)
    x = jr.normal(getkey(), (4, 3, 2, 1))
    variables = model.init(getkey(), x)
    assert jnp.array_equal(
        model.apply(variables, x), model.apply(variables, x.reshape(4, 6))
    )
