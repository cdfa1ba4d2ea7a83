import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.lowrank import energy, Factored, factorize
from jaxeff.program import dense, is_leaf, lift_report, trace
from jaxeff.quantization import quantize
from tests.zoo import ZOO

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_gradient_flows_into_both_factors_through_scan_and_remat",
}

CASES = {c.name: c for c in ZOO}
SOME = [
    "linen_cnn",
    "linen_gpt",
    "linen_llama_scan_remat",
    "nnx_transformer",
    "equinox_cnn",
    "plain_transformer",
    "plain_lstm",
]


def off(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def factored(params):
    leaves = tree.paths(params, is_leaf)
    return {k: x for k, x in leaves.items() if isinstance(x, Factored)}


@pytest.mark.parametrize("name", SOME)
def test_a_factored_model_computes_with_its_dense_weights(name, getkey):
    fn, params, args = CASES[name].build(getkey())
    lifted, low = factorize(fn, params, *args, ranks={"**": 0.4})
    assert factored(low)
    assert all(e.native for e in lift_report(lifted, low, *args))
    assert tree.tree_size(low) < tree.tree_size(params)

    @jax.jit
    def run(params, low):
        return lifted(low, *args), fn(dense(low), *args)

    ours, expected = run(params, low)
    assert off(ours, expected) < 1e-5
    program = lambda fn, p: trace(fn, p, *args).costs.flops
    assert program(lifted, low) < program(fn, params)


SHAPES = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    "fn, shape, split",
    [
        (lambda p, x: x @ p["w"], (8, 6), (0, 1, 1)),
        (lambda p, x: x @ p["w"].T, (6, 8), (0, 1, 1)),
        (lambda p, x: x @ p["w"].T @ p["w"], (6, 8), (0, 1, 1)),
        (lambda p, x: p["w"][x.astype(int)], (6, 8), (0, 1, 1)),
        (lambda p, x: p["w"][:, x.astype(int)], (6, 8), (0, 1, 1)),
        (lambda p, x: p["w"][jnp.arange(3)] @ p["w"].T, (6, 8), (0, 1, 1)),
        (lambda p, x: x @ p["w"].reshape(8, 6), (8, 2, 3), (0, 1, 2)),
        (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (8, 2, 3), (0, 1, 2)),
        (lambda p, x: jnp.einsum("bd,hkd->bhk", x, p["w"]), (2, 3, 8), (0, 2, 1)),
        (lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]), (2, 8, 6), None),
        (lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), (3, 8, 6), None),
        (
            lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0],
            (3, 8, 8),
            (1, 1, 1),
        ),
        (
            lambda p, x: jnp.einsum("hbd,hdk->hbk", jnp.stack([x, x]), p["w"]),
            (2, 8, 6),
            (1, 1, 1),
        ),
    ],
)
def test_a_weight_is_cut_between_what_is_summed_and_what_comes_out(
    fn, shape, split, normal
):
    params, x = {"w": normal(*shape), "other": normal(5, 8, 8)}, normal(5, 8)
    both = lambda p, x: (fn(p, x), (x[:, None] @ p["other"]).sum())
    _, low = factorize(both, params, x, ranks={"**": 1})
    if split is None:
        assert low["w"] is params["w"]
    else:
        w = low["w"]
        assert (w.batch, w.rows, w.cols) == split and w.shape == shape


def matmul(params, x):
    return x @ params["w"]


def test_ranks_by_count_by_fraction_and_by_energy(normal):
    params = {k: normal(16, 12) for k in "abc"}
    fn = lambda p, x: sum(x @ p[k] for k in "abc")
    thin = jnp.outer(normal(16), normal(12)) + 1e-3 * params["c"]
    params["c"] = thin
    ranks = {"a": 3, "b": 0.25, "**": energy(0.99)}
    _, low = factorize(fn, params, normal(5, 16), ranks=ranks)
    assert {k: x.rank for k, x in factored(low).items()} == {"a": 3, "b": 3, "c": 1}


def test_the_gradient_flows_into_both_factors_through_scan_and_remat(getkey):
    fn, params, args = CASES["linen_llama_scan_remat"].build(getkey())
    lifted, low = factorize(fn, params, *args, ranks={"**/kernel": 0.25})
    loss = lambda fn, p: jnp.sin(fn(p, *args)).sum()

    @jax.jit
    def run(low):
        return jax.grad(lambda p: loss(lifted, p))(low), jax.grad(
            lambda p: loss(fn, dense(p))
        )(low)

    ours, expected = run(low)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_what_would_grow_stays_as_long_as_something_shrinks(normal):
    params = {"big": normal(16, 16), "head": normal(16, 3)}
    fn = lambda p, x: x @ p["big"] @ p["head"]
    _, low = factorize(fn, params, normal(5, 16), ranks={"**": 4})
    assert low["big"].rank == 4 and low["head"] is params["head"]


def test_a_weight_that_would_be_multiplied_out_stays(normal):
    params = {"fused": normal(12, 24), "moving": normal(12, 24)}

    def fn(p, x):
        a, b = x @ p["fused"][:, :10], x @ p["fused"][:, 10:]
        at = (x[0, 0] > 0).astype(int)
        return (
            a.sum() + b.sum() + x @ jax.lax.dynamic_slice(p["moving"], (0, at), (12, 8))
        )

    x = normal(5, 12)
    lifted, low = factorize(fn, params, x, ranks={"**": 2})
    assert low["moving"] is params["moving"]
    assert factored(low).keys() == {"fused"}
    assert all(use.native for use in lift_report(lifted, low, x))
    np.testing.assert_allclose(lifted(low, x), fn(dense(low), x), rtol=1e-4)
    with pytest.raises(ValueError, match="multiplied out for dynamic_slice at test_"):
        factorize(fn, params, x, ranks={"moving": 2})


def test_shapes_can_be_factored_without_the_weights(getkey):
    fn, params, args = CASES["linen_llama"].build(getkey())
    shapes = jax.eval_shape(lambda p: p, params)
    _, low = factorize(fn, shapes, *args, ranks={"**/kernel": 0.25})
    _, expected = factorize(fn, params, *args, ranks={"**/kernel": 0.25})
    assert jax.tree.structure(low) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, low, expected)
    assert all(jax.tree.leaves(same))


def depthwise(params, x):
    return jax.lax.conv_general_dilated(
        x,
        params["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )


BAD = {
    "no weight": (matmul, (8, 6), {"**/kernel": 2}, "matches none of the 1 weights"),
    "no rank": (matmul, (8, 6), {"w": 0}, r"got 0"),
    "no use": (lambda p, x: x * p["w"], (5, 8), {"w": 2}, "no product, convolution"),
    "larger than dense": (
        matmul,
        (8, 6),
        {"w": 4},
        "'w' factors none of the 1 weights it matches: w: rank 4 of a 8 x 6 matrix "
        "takes 56 numbers, and the matrix 48. Choose other weights or a smaller rank",
    ),
    "larger than full": (matmul, (8, 6), {"w": 7}, "has at most rank 6, and 7 is ask"),
    "depthwise": (depthwise, (3, 3, 1, 8), {"w": 1}, "kernel of a grouped convolution"),
    "middle": (
        lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]),
        (2, 8, 6),
        {"w": 1},
        r"summed dims \(1,\) and output dims \(0, 2\) are no two halves",
    ),
    "two cuts": (
        lambda p, x: (
            jnp.einsum("bd,dhk->bhk", x, p["w"]),
            jnp.einsum("bk,dhk->bdh", x[:, :3], p["w"]),
        ),
        (8, 2, 3),
        {"w": 1},
        "its uses would cut it in different places",
    ),
    "energy of a shape": (matmul, (8, 6), {"w": energy(0.5)}, "w: energy.* values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    fn, shape, ranks, message = BAD[name]
    params = {"w": SHAPES(shape, jnp.float32)}
    x = SHAPES((1, 5, 5, 8) if fn is depthwise else (5, 8), jnp.float32)
    with pytest.raises(ValueError, match=message) as e:
        factorize(fn, params, x, ranks=ranks)
    assert "\n" not in str(e.value)


def test_what_is_compressed_already_is_no_match(normal):
    params, x = {"w": normal(16, 12)}, normal(5, 16)
    fn, low = factorize(matmul, params, x, ranks={"w": 4})
    with pytest.raises(ValueError, match="w: it is compressed already"):
        factorize(fn, low, x, ranks={"w": 2})


def test_one_rank_is_for_every_weight(normal):
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    params, x = {"a": normal(8, 8), "b": normal(8, 8)}, normal(2, 8)
    _, low = factorize(fn, params, x, ranks=0.25)
    assert low["a"].rank == low["b"].rank == 2


def test_a_quantized_weight_is_factored_before_it_is_quantized(normal):
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    params, x = {"a": normal(8, 8), "b": normal(8, 8)}, normal(2, 8)
    with pytest.raises(ValueError, match="already.*Factorize before quantizing"):
        factorize(*quantize(fn, params, x), x, ranks=0.25)
