import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff import quantization, tree
from jaxeff.parallelism import (
    audit,
    batch_sharding,
    layer_parallel,
    make_mesh,
    plan_layers,
)
from jaxeff.program import lift
from jaxeff.training import forms
from tests.parallelism.models import (
    loss_problem,
    model_and_data,
    MODELS,
    near,
    ten_steps,
)

SLOW = {
    f"test_value_gradient_and_ten_steps_are_those_of_one_device[{name}]"
    for name in ("bert", "llama", "llama scanned", "vit", "resnet20", "mobilenet")
} | {
    "test_running_averages_come_from_the_device_that_has_the_layer",
    "test_compressed_weights_stay_compressed",
    "test_one_activation_crosses_each_way_and_weights_are_shared_out",
    "test_other_batches_fit_and_other_programs_do_not",
}


def problem(name):
    return loss_problem(name, layers=4)


@pytest.mark.parametrize("name", MODELS)
def test_value_gradient_and_ten_steps_are_those_of_one_device(name):
    loss, params, x = problem(name)
    mesh = make_mesh(pipe=4, data=2)
    layered, weights = layer_parallel(loss, params, x, mesh=mesh)
    back = layered.join(weights)
    near(back, params, rel=0)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    shared = jax.device_put(x, batch_sharding(mesh, len(x)))
    value, grads, new = ten_steps(layered, weights, shared)
    *want, expected = ten_steps(loss, params, x)
    near((value, layered.join(grads)), want)
    near(layered.join(new), expected)


def test_one_activation_crosses_each_way_and_weights_are_shared_out():
    loss, params, x = problem("llama")
    mesh = make_mesh(pipe=4, data=1, devices=jax.devices()[:4])
    layered, weights = layer_parallel(loss, params, x, mesh=mesh)
    activation = 4 * 16 * 32 * 4
    assert layered.plan.sends == (activation, activation, activation, 0)
    ahead = audit(jax.jit(layered).lower(weights, x).compile(), mesh)
    assert ahead.of("collective-permute", "pipe").bytes == 3 * activation
    both = audit(jax.jit(jax.grad(layered)).lower(weights, x).compile(), mesh)
    assert both.of("collective-permute", "pipe").bytes == 6 * activation
    (row,) = weights.pieces.values()
    assert row.sharding.spec == P("pipe") and not weights.shared
    assert row.shape[1] * 4 == max(layered.plan.weights)


def test_a_tied_embedding_is_one_weight():
    loss, params, x = problem("gpt")
    plan = plan_layers(loss, params, x, pieces=2)
    assert plan.shared == 64 * 32 * 4
    assert "on every device" in str(plan)


def test_the_heaviest_piece_is_as_light_as_can_be():
    loss, params, x = problem("llama")
    everywhere = plan_layers(loss, params, x, pieces=4, slack=0)
    cheaper = plan_layers(loss, params, x, pieces=4, slack=0.05)
    assert max(cheaper.flops) <= 1.05 * max(everywhere.flops)
    assert sum(everywhere.flops) == sum(cheaper.flops)
    assert everywhere.imbalance < 0.2


def test_layers_of_a_scan_are_cut_one_by_one():
    stacked = plan_layers(*problem("llama scanned"), pieces=4)
    apart = plan_layers(*problem("llama"), pieces=4)
    assert stacked.flops == apart.flops and stacked.weights == apart.weights


def test_running_averages_come_from_the_device_that_has_the_layer():
    model, x = model_and_data("resnet20")
    params = jax.jit(model.init)(jr.key(0), x)
    _, fn = forms(model, params)
    mesh = make_mesh(pipe=4, data=2)
    layered, weights = layer_parallel(fn, params, x, mesh=mesh)
    shared = jax.device_put(x, batch_sharding(mesh, len(x)))
    near(jax.jit(layered)(weights, shared), jax.jit(fn)(params, x))


def test_random_keys_are_the_same_as_on_one_device():
    def fn(params, x, key):
        for w, k in zip(params, jr.split(key, 4), strict=True):
            x = jnp.where(jr.bernoulli(k, 0.5, x.shape), jnp.tanh(x @ w), 0)
        return x

    params = [jr.normal(jr.key(i), (16, 16)) for i in range(4)]
    x, key = jnp.ones((8, 16)), jr.key(9)
    layered, weights = layer_parallel(fn, params, x, key, mesh=make_mesh(pipe=4))
    near(layered(weights, x, key), fn(params, x, key))


def test_compressed_weights_stay_compressed():
    loss, params, x = problem("gpt")
    fn, small = quantization.quantize(loss, params, x, formats=quantization.int8)
    layered, weights = layer_parallel(fn, small, x, mesh=make_mesh(pipe=4))
    assert "int8" in weights.pieces
    near(layered(weights, x), lift(fn)(small, x))
    kept, back = (tree.paths(p) for p in (small, layered.join(weights)))
    assert kept.keys() == back.keys()


def test_other_batches_fit_and_other_programs_do_not():
    loss, params, x = problem("gpt")
    layered, weights = layer_parallel(loss, params, x, mesh=make_mesh(pipe=4))
    near(layered(weights, x[:2]), loss(params, x[:2]))
    twice = lambda p, x, y=None: loss(p, x) + (0.0 if y is None else loss(p, y))
    layered, weights = layer_parallel(twice, params, x, mesh=make_mesh(pipe=4))
    with pytest.raises(ValueError, match="steps, but .* where it was cut"):
        layered(weights, x, x)


def test_a_program_of_as_many_steps_that_uses_weights_elsewhere_is_an_error():
    def fn(params, x, turned=None):
        for w in params if turned is None else params[::-1]:
            x = jnp.tanh(x @ w)
        return x

    params, x = [jr.normal(jr.key(i), (8, 8)) for i in range(4)], jnp.ones((8, 8))
    layered, weights = layer_parallel(fn, params, x, mesh=make_mesh(pipe=4))
    with pytest.raises(ValueError, match="piece 0 uses 3, which another has where"):
        layered(weights, x, turned=True)
    with pytest.raises(ValueError, match="the axes data, and none is called pipe"):
        layer_parallel(fn, params, x, mesh=jax.make_mesh((8,), ("data",)))


def test_skips_that_cross_everywhere_are_refused_with_their_number():
    model, x = model_and_data("unet")
    params = jax.eval_shape(model.init, jr.key(0), x)
    with pytest.raises(ValueError, match="can't be cut into 64 pieces"):
        plan_layers(model.apply, params, x, pieces=64)
    few = plan_layers(model.apply, params, x, pieces=4, crossing=3)
    assert few.imbalance < plan_layers(model.apply, params, x, pieces=4).imbalance


def test_a_plan_is_for_as_many_devices_as_it_has_pieces():
    loss, params, x = problem("gpt")
    plan = plan_layers(loss, params, x, pieces=2)
    with pytest.raises(ValueError, match="plan has 2 pieces, but the axis pipe"):
        layer_parallel(loss, params, x, mesh=make_mesh(pipe=4), plan=plan)
