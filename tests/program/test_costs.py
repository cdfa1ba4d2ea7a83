import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxeff.program import trace
from jaxeff.program.costs import Cost, count

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
LAYERS = jax.ShapeDtypeStruct((10, 8, 8), jnp.float32)


def layer(x, w):
    return jnp.tanh(x @ w) + x


def as_scan(params, x):
    return lax.scan(lambda x, w: (layer(x, w), None), x, params)[0]


def as_loop(params, x):
    for i in range(10):
        x = layer(x, params[i])
    return x


def as_remat_scan(params, x):
    body = jax.checkpoint(lambda x, w: (layer(x, w), None))
    return lax.scan(body, x, params)[0]


def as_nested_scan(params, x):
    params = params.reshape(5, 2, 8, 8)
    return lax.scan(lambda x, ws: (as_scan(ws, x), None), x, params)[0]


def test_a_scan_of_ten_layers_costs_what_ten_layers_cost():
    scan, loop = trace(as_scan, LAYERS, X).costs, trace(as_loop, LAYERS, X).costs
    assert scan.flops == loop.flops == 10 * (2 * 4 * 8 * 8 + 4 * 8)
    assert scan.matmul_flops == loop.matmul_flops == 10 * 2 * 4 * 8 * 8
    assert scan.transcendentals == loop.transcendentals == 10 * 4 * 8
    assert scan.weights[""].flops == loop.weights[""].flops == 10 * 2 * 4 * 8 * 8
    assert scan.weights == loop.weights


@pytest.mark.parametrize("fn", [as_remat_scan, as_nested_scan])
def test_turns_of_loops_multiply(fn):
    costs, scan = trace(fn, LAYERS, X).costs, trace(as_scan, LAYERS, X).costs
    assert (costs.flops, costs.weights) == (scan.flops, scan.weights)


def test_a_layer_of_a_scan_costs_what_the_compiler_says_of_all():
    # The compiler counts a scan's body once: the reason to count on the trace.
    xla = jax.jit(as_scan).lower(LAYERS, X).cost_analysis()["flops"]
    assert xla < trace(as_scan, LAYERS, X).costs.flops / 5


def test_an_unknown_loop_counts_one_turn_and_is_counted():
    def fn(w, x):
        return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

    costs = trace(fn, jnp.ones((8, 8)), X).costs
    assert costs.unknown_loops == 1
    assert costs.weights[""].flops == costs.matmul_flops == 2 * 4 * 8 * 8


def test_all_branches_count():
    def fn(params, x):
        return lax.cond(
            x[0, 0] > 0, lambda x: x @ params["a"], lambda x: x @ params["b"], x
        )

    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 3))}
    costs = trace(fn, params, X).costs
    assert costs.matmul_flops == 2 * (2 * 4 * 8 * 3)
    assert set(costs.weights) == {"a", "b"}


def test_what_no_output_needs_costs_nothing():
    def fn(w, x):
        y = jax.jit(lambda x: (x @ w, jnp.cos(x)))(x)
        lax.scan(layer_sum, x, jnp.ones((3, 8, 8)))
        return y[0]

    def layer_sum(x, w):
        return x @ w, x.sum()

    costs = trace(fn, jnp.ones((8, 8)), X).costs
    assert (costs.flops, costs.transcendentals) == (2 * 4 * 8 * 8, 0)


def test_what_has_an_effect_costs_although_no_output_needs_it():
    def fn(w, x):
        jax.debug.callback(lambda y: None, x @ w)
        return x

    assert trace(fn, jnp.ones((8, 8)), X).costs.flops == 2 * 4 * 8 * 8


def test_bytes_are_operands_and_results_of_each_operation():
    w = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    costs = trace(lambda w, x: x @ w, w, x).costs
    product = 2 * (4 * 8 + 8 * 3 + 4 * 3)
    assert costs.bytes == product
    assert costs.weights == {"": Cost(2 * 4 * 8 * 3, product)}


def test_costs_of_a_weight_are_those_of_all_its_sites():
    w = jnp.ones((8, 8))
    costs = trace(lambda w, x: jnp.tanh(x @ w) @ w.T, w, X).costs
    assert costs.weights[""].flops == 2 * (2 * 4 * 8 * 8) == costs.matmul_flops


def test_inside_shard_map_one_device_is_counted():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    assert trace(fn, jnp.ones((8, 3)), x).costs.flops == 2 * 2 * 8 * 3


def test_keys_and_empty_arrays_are_counted_without_harm():
    def fn(key, x):
        x = x[:0] @ x.T
        return jax.random.normal(key, (2, 3)), x

    costs = count(jax.make_jaxpr(fn)(jax.random.key(0), X))
    assert costs.matmul_flops == 0 and costs.flops > 0
