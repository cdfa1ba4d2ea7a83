import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.cost import count_parameters, layer_costs
from jaxeff.program import lift
from jaxeff.quantization import int4, int8, quantize
from jaxeff.tree import tree_bytes


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Named against the alphabet, in which Linen keeps its variables.
        x = nn.Dense(32, name="second_to_none")(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(8, name="a_last_one")(nn.relu(x))


@pytest.fixture
def model(getkey):
    x = jr.normal(getkey(), (4, 64))
    return Net().apply, Net().init(getkey(), x), x


def test_layers_add_up_to_the_model(model):
    fn, params, x = model
    layers = layer_costs(fn, params, x)
    assert sum(la["parameters"] for la in layers) == count_parameters(params)
    assert sum(la["bytes"] for la in layers) == tree_bytes(params)
    assert sum(la["flops"] for la in layers) >= 2 * 4 * (64 * 32 + 32 * 8)


def test_running_statistics_are_bytes_but_no_parameters(model):
    fn, params, x = model
    norm = {la["path"]: la for la in layer_costs(fn, params, x)}["BatchNorm_0"]
    assert norm["parameters"] == 2 * 32
    assert norm["bytes"] == 4 * 4 * 32
    assert count_parameters(params) == count_parameters(params["params"])


def test_layers_come_in_the_order_of_the_computation(model):
    fn, params, x = model
    names = [la["path"] for la in layer_costs(fn, params, x)]
    assert names.index("second_to_none") < names.index("a_last_one")


def test_flops_are_shared_among_the_examples(model):
    fn, params, x = model
    by_path = lambda **o: {
        la["path"]: la["flops"] for la in layer_costs(fn, params, x, **o)
    }
    whole, shared = by_path(), by_path(examples=4)
    assert shared["a_last_one"] == whole["a_last_one"] / 4 == 2 * 32 * 8


@pytest.mark.parametrize("form", [int8, int4])
def test_a_quantized_layer_weighs_less_and_computes_the_same(model, form):
    fn, params, x = model
    small_fn, small = quantize(fn, params, x, formats={"params/**/kernel": form})
    before = {la["path"]: la for la in layer_costs(fn, params, x)}
    after = {la["path"]: la for la in layer_costs(small_fn, small, x)}
    assert before.keys() == after.keys()
    for name in ("second_to_none", "a_last_one"):
        assert after[name]["parameters"] == before[name]["parameters"]
        assert after[name]["flops"] == before[name]["flops"]
        assert after[name]["bytes"] < before[name]["bytes"] / 2


def test_shapes_are_enough(model):
    fn, params, x = model
    shapes = jax.eval_shape(lambda: params)
    assert layer_costs(fn, shapes, x) == layer_costs(fn, params, x)


def test_weights_that_no_layer_holds_are_layers_of_their_own():
    fn = lambda params, x: x @ params[0] @ params[1]
    weights = [jnp.ones((4, 6)), jnp.ones((6, 2))]
    layers = layer_costs(fn, weights, jnp.ones((3, 4)))
    assert [la["path"] for la in layers] == ["0", "1"]
    assert [la["flops"] for la in layers] == [2 * 3 * 4 * 6, 2 * 3 * 6 * 2]
    assert layer_costs(lift(fn), weights, jnp.ones((3, 4))) == layers
