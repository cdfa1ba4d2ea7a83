"""A statistic of what flows into each weight, beside outputs that do not change."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxeff import lift, observe, trace
from jaxeff.program import dense
from tests.program.built import build, some
from tests.program.leaves import compress, Scaled
from tests.program.shrinking import distance, random_keep, shrunk


def the_input(site, x):
    return x


def largest(site, x):
    return jnp.max(jnp.abs(x))


X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
PARAMS = {
    "a": np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32),
    "b": np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32),
}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def by_weight(fn, params, *args, **options):
    outs, seen = jax.jit(observe(fn, the_input, **options))(params, *args)
    return seen.by_weight()


@some(
    "linen_mobilenet",
    "linen_llama_scan_remat",
    "linen_transformer",
    "nnx_transformer",
    "equinox_cnn",
    "plain_transformer",
    "plain_custom_vjp",
    "plain_lstm",
)
def test_observing_changes_no_output_bit_and_sees_every_site(case):
    model = build(case)
    outs, seen = jax.jit(observe(model.fn, largest))(model.params, *model.args)
    assert jnp.array_equal(outs, model.jitted(model.params, *model.args))
    sites = model.program.sites
    assert [s.name for s in seen.sites] == [s.name for s in sites]
    for site in sites:
        value = seen.values[site.name]
        assert value.ndim == int(site.times > 1) and jnp.any(value > 0)


def test_the_statistic_is_that_of_the_inputs():
    seen = by_weight(mlp, PARAMS, X)
    (x,), (h,) = seen["a"], seen["b"]
    assert np.array_equal(x, X)
    assert distance(h, np.tanh(X @ PARAMS["a"])) < 1e-6


def test_the_statistic_gets_the_site_and_may_be_any_tree():
    def gram(site, x):
        assert site.path == "b" and site.contract == (0,)
        return {"gram": x.T @ x, "n": jnp.int32(x.shape[0])}

    _, seen = observe(mlp, gram, weights="b")(PARAMS, X)
    h = np.tanh(X @ PARAMS["a"])
    ((value,),) = seen.by_weight().values()
    assert distance(value["gram"], h.T @ h) < 1e-5 and value["n"] == 4


def test_every_kind_of_site_sees_its_other_operand():
    def fn(p, tokens):
        x = p["e"][tokens]  # a look-up sees the indices
        x = lax.conv_general_dilated(
            x, p["c"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.einsum("od,bsd->bso", p["w"], x)  # the weight stands first

    rng = np.random.default_rng(3)
    params = {
        "e": rng.normal(size=(7, 4)).astype(np.float32),
        "c": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "w": rng.normal(size=(6, 5)).astype(np.float32),
    }
    tokens = rng.integers(0, 7, (2, 3)).astype(np.int32)
    seen = {path: values[0] for path, values in by_weight(fn, params, tokens).items()}
    assert np.array_equal(seen["e"][..., 0], tokens)
    assert np.array_equal(seen["c"], params["e"][tokens])
    want = np.einsum("od,bsd->bso", params["w"], seen["w"])
    assert distance(want, fn(params, tokens)) < 1e-6


def test_two_weights_that_meet_see_each_other():
    seen = by_weight(lambda p, x: x @ (p["a"] @ p["b"]), PARAMS, X)
    assert np.array_equal(seen["a"][0], PARAMS["b"])
    assert np.array_equal(seen["b"][0], PARAMS["a"])


def test_a_weight_used_twice_has_two_values():
    def fn(p, x):
        return (jnp.tanh(x @ p["a"]) @ p["b"]) @ p["a"]

    seen = by_weight(fn, PARAMS, X)
    assert np.array_equal(seen["a"][0], X)
    assert distance(seen["a"][1], mlp(PARAMS, X)) < 1e-6


STACKED = {name: np.stack([w, w * 2, w * 3]) for name, w in PARAMS.items()}


def scanned(params, x):
    def layer(x, p):
        return mlp(p, x), None

    return lax.scan(layer, x, params)[0]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint], ids=["", "remat"])
def test_in_a_scan_each_turn_has_its_value(wrap):
    fn = lambda p, x: lax.scan(wrap(lambda x, p: (mlp(p, x), None)), x, p)[0]
    inputs = [X]
    for i in range(2):
        inputs.append(mlp({n: w[i] for n, w in STACKED.items()}, inputs[-1]))
    seen = by_weight(fn, STACKED, X)
    assert distance(seen["a"][0], np.stack(inputs)) < 1e-6


def test_in_scans_in_scans_the_outer_turns_come_first():
    def fn(p, x):
        p = {n: w.reshape(3, 1, *w.shape[1:]) for n, w in p.items()}
        return lax.scan(lambda x, p: (scanned(p, x), None), x, p)[0]

    seen = by_weight(fn, STACKED, X)["a"][0]
    assert seen.shape == (3, 1, 4, 6)
    assert distance(seen[:, 0], by_weight(scanned, STACKED, X)["a"][0]) < 1e-6


def test_a_branch_that_was_not_taken_sees_zeros():
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: jnp.sin(x) @ p["b"].T)

    for x in (np.abs(X), -np.abs(X)):
        seen = by_weight(fn, PARAMS, x)
        taken, other = (seen["a"][0], seen["b"][0])[:: 1 if x[0, 0] > 0 else -1]
        assert np.any(taken) and not np.any(other)
        assert taken.shape == other.shape == x.shape


WHERE = {
    "jit": lambda p, x: jax.jit(mlp)(p, x),
    "remat": lambda p, x: jax.checkpoint(mlp)(p, x),
    "custom_vjp": lambda p, x: _own(p, x),
    "map": lambda p, x: lax.map(lambda x: mlp(p, x[None])[0], x),
}


@jax.custom_vjp
def _own(p, x):
    return mlp(p, x)


_own.defvjp(lambda p, x: (_own(p, x), None), lambda r, g: (None, None))


@pytest.mark.parametrize("name", WHERE)
def test_sites_are_seen_wherever_they_are(name):
    seen = by_weight(WHERE[name], PARAMS, X)
    assert np.array_equal(np.reshape(seen["a"][0], X.shape), X)
    assert distance(np.reshape(seen["b"][0], (4, 5)), np.tanh(X @ PARAMS["a"])) < 1e-6


def in_while(p, x):
    return lax.while_loop(lambda x: x.sum() < 1, lambda x: mlp(p, x) + 1, x)


def in_shard_map(p, x):
    return jax.shard_map(
        mlp,
        mesh=jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("a")),
        out_specs=P("a"),
    )(p, x)


def test_in_a_while_there_is_no_array_to_stack_values_in():
    with pytest.raises(ValueError, match="2 of 2 sites cannot be observed.*`while`"):
        observe(in_while, largest)(PARAMS, X)
    # Other weights can be observed.
    fn = lambda p, x: in_while(p, x @ p["c"])
    params = {**PARAMS, "c": np.eye(6, dtype=np.float32)}
    outs, seen = observe(fn, largest, weights="c")(params, X)
    assert distance(outs, in_while(PARAMS, X)) < 1e-5 and len(seen.values) == 1


def test_in_a_shard_map_no_weight_is_whole():
    with pytest.raises(ValueError, match="matches no observable weight"):
        observe(in_shard_map, largest)(PARAMS, X)


def test_a_pattern_that_matches_no_site_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 observable weights"):
        observe(mlp, largest, weights="**/kernel")(PARAMS, X)


def test_what_is_observed_crosses_jit_grad_and_vmap():
    def loss(params):
        outs, seen = observe(mlp, largest)(params, X)
        return outs.sum(), seen

    (_, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    assert [s.path for s in seen.sites] == ["a", "b"]
    want = jax.grad(lambda p: mlp(p, X).sum())(PARAMS)
    assert distance(grads, want) < 1e-6
    batched = jax.vmap(observe(mlp, largest), (None, 0))(PARAMS, np.stack([X, 2 * X]))
    assert batched[1].by_weight()["a"][0].shape == (2,)


def test_gradients_may_go_through_the_statistic():
    def penalty(params):
        return sum(observe(mlp, largest)(params, X)[1].values.values())

    grads = jax.grad(penalty)(PARAMS)
    want = jax.grad(lambda p: jnp.max(jnp.abs(jnp.tanh(X @ p["a"]))))(PARAMS)
    assert distance(grads, want) < 1e-6


@some("linen_cnn", "plain_transformer", "linen_transformer")
def test_lifted_functions_are_observed_on_their_leaves(case):
    model = build(case)
    leaves = compress(model.params)
    outs, seen = jax.jit(observe(lift(model.fn), largest))(leaves, *model.args)
    want, dense_seen = jax.jit(observe(model.fn, largest))(dense(leaves), *model.args)
    assert distance(outs, want) < 1e-4
    assert seen.values.keys() == dense_seen.values.keys()
    assert distance(seen.values, dense_seen.values) < 1e-3


def test_a_leaf_that_meets_a_leaf_sees_the_dense_array():
    leaves = compress(PARAMS)
    seen = by_weight(lift(lambda p, x: x @ (p["a"] @ p["b"])), leaves, X)
    assert distance(seen["a"][0], leaves["b"].dense()) == 0
    assert isinstance(leaves["b"], Scaled)


def test_shrunk_functions_are_observed_at_their_size():
    couplings = trace(mlp, PARAMS, X).couplings
    fn, small = shrunk(
        mlp, PARAMS, couplings, random_keep(couplings, np.random.default_rng(0))
    )
    assert small["b"].shape[0] < 5
    seen = by_weight(fn, small, X)
    assert seen["b"][0].shape == (4, small["b"].shape[0])
    assert distance(seen["b"][0], np.tanh(X @ small["a"])) < 1e-6


def test_calibration_data_are_summed_in_a_scan_of_batches():
    batches = jr.normal(jr.key(0), (3, 4, 6))

    def run(total, x):
        _, seen = observe(mlp, lambda site, x: x.T @ x, weights="a")(PARAMS, x)
        return total + seen.by_weight()["a"][0], None

    total, _ = jax.jit(lambda xs: lax.scan(run, jnp.zeros((6, 6)), xs))(batches)
    flat = np.asarray(batches).reshape(-1, 6)
    assert distance(total, flat.T @ flat) < 1e-5
