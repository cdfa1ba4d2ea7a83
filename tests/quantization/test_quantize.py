import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.program import dense, is_leaf, lift, lift_report
from jaxeff.quantization import (
    awq,
    fake_quantize,
    int4,
    int8,
    Linear,
    QArray,
    quantize,
    uint4,
    uint8,
    w8a8,
)
from jaxeff.quantization.products import longest_sum
from tests.zoo import ZOO

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_an_integer_model_is_near_the_one_with_its_dense_weights[linen_mobilenet]",
    "test_a_quantized_model_computes_with_its_dense_weights[linen_gpt]",
    "test_a_quantized_model_computes_with_its_dense_weights[nnx_transformer]",
}

CASES = {c.name: c for c in ZOO}
WEIGHTS = [
    "linen_gpt",
    "linen_llama_scan_remat",
    "nnx_transformer",
    "equinox_cnn",
    "plain_control_flow",
]
LONGEST_SUM = longest_sum(Linear(8), Linear(8))
BOTH = ["linen_mobilenet", "nnx_cnn", "plain_transformer"]


def off(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def assert_native(lifted, q, args):
    leaves = [x for x in jax.tree.leaves(q, is_leaf=is_leaf) if is_leaf(x)]
    assert leaves and all(e.native for e in lift_report(lifted, q, *args))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_quantized_model_computes_with_its_dense_weights(name, getkey):
    fn, params, args = CASES[name].build(getkey())
    lifted, q = quantize(fn, params, *args)
    assert_native(lifted, q, args)

    @jax.jit
    def run(params, q):
        return fn(params, *args), fn(dense(q), *args), lifted(q, *args)

    y, rounded, ours = run(params, q)
    assert off(ours, rounded) < 3e-6
    assert 0 < off(rounded, y) < 0.05


@pytest.mark.parametrize("name", BOTH)
def test_an_integer_model_is_near_the_one_with_its_dense_weights(name, getkey):
    fn, params, args = CASES[name].build(getkey())
    lifted, q = quantize(fn, params, *args, formats={"**": w8a8})
    assert_native(lifted, q, args)

    @jax.jit
    def run(q):
        return fn(dense(q), *args), lifted(q, *args)

    rounded, ours = run(q)
    assert 1e-4 < off(ours, rounded) < 0.05  # activations are rounded, and no more


def test_a_trained_weight_takes_the_bits_it_claims(getkey):
    fn, params, args = CASES["linen_gpt"].build(getkey())
    for fmt, bits in ((int8, 8), (int4, 4), (int4.grouped(8), 8)):
        _, q = quantize(fn, params, *args, formats={"**/kernel": fmt})
        for x in jax.tree.leaves(q, is_leaf=is_leaf):
            if is_leaf(x):
                scales = 32 * x.scale.size / x.size
                assert 8 * tree.tree_bytes(x) / x.size == min(bits, fmt.bits) + scales


def matmul(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    "fn, shape, lengths",
    [
        (matmul, (8, 6), (1, 6)),
        (lambda p, x: x @ p["w"].T, (6, 8), (6, 1)),
        (lambda p, x: x @ p["w"].T @ p["w"], (6, 8), (1, 1)),  # summed both ways
        (lambda p, x: p["w"][jnp.arange(3)] + x[:3, :1], (6, 8), (6, 1)),
        (lambda p, x: (p["w"][jnp.arange(3)] + x[:3]) @ p["w"].T, (6, 8), (6, 1)),
        (lambda p, x: x @ p["w"].reshape(8, 6), (8, 2, 3), (1, 2, 3)),
        (lambda p, x: x @ p["w"].reshape(8, 6), (2, 4, 6), (1, 1, 6)),
        (lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]), (2, 8, 3), (2, 1, 3)),
        (
            lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0],
            (3, 8, 8),
            (3, 1, 8),
        ),
        (lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), (3, 8, 6), (3, 1, 6)),
    ],
)
def test_a_scale_is_shared_along_what_is_summed_and_nothing_else(
    fn, shape, lengths, normal
):
    params, x = {"w": normal(*shape)}, normal(5, 8)
    lifted, q = quantize(fn, params, x)
    assert q["w"].scale.shape == lengths
    assert all(e.native for e in lift_report(lifted, q, x))
    assert off(jax.jit(lifted)(q, x), jax.jit(fn)(dense(q), x)) < 3e-6


def test_the_first_pattern_counts_and_none_leaves_a_weight(normal):
    fn = lambda p, x: x @ p["a"] @ p["b"] @ p["c"] + p["bias"][None]
    params = {k: normal(8, 8) for k in "abc"} | {"bias": normal(8)}
    x = normal(5, 8)
    formats = {"a": int4, "b": None, "**": w8a8.grouped(4)}
    _, q = quantize(fn, params, x, formats=formats)
    assert (q["a"].bits, q["c"].bits, q["c"].activations) == (4, 8, "int8")
    assert q["b"] is params["b"] and q["bias"] is params["bias"]
    again = quantize(fn, q, x, formats={"**": int8})[1]
    assert again["a"] is q["a"]  # what is quantized stays
    assert again["b"].bits == 8


def test_shapes_can_be_quantized_without_the_weights(getkey):
    fn, params, args = CASES["linen_llama"].build(getkey())
    shapes = jax.eval_shape(lambda p: p, params)
    _, q = quantize(fn, shapes, *args)
    _, expected = quantize(fn, params, *args)
    assert jax.tree.structure(q) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, q, expected)
    assert all(jax.tree.leaves(same))


def test_quantizing_can_be_compiled(normal):
    params, x = {"w": normal(8, 6)}, normal(5, 8)
    compiled = jax.jit(lambda p: quantize(matmul, p, x, formats={"w": int4})[1])
    _, eager = quantize(matmul, params, x, formats={"w": int4})
    np.testing.assert_array_equal(compiled(params)["w"].dense(), eager["w"].dense())


def test_without_compressed_weights_nothing_changes(normal):
    fn, params, x = matmul, {"w": normal(8, 6)}, normal(5, 8)
    lifted, _ = quantize(fn, params, x)
    np.testing.assert_array_equal(lifted(params, x), fn(params, x))
    assert quantize(lifted, params, x)[0] is lift(lifted) is lifted


BAD = {
    "no weight": (
        lambda p, x: x @ p["w"],
        {"w": (8, 6)},
        {"**/kernel": int8},
        "matches none of the 1 weights. Nearest: w",
    ),
    "only biases": (
        lambda p, x: x @ p["w"] + p["bias"][None],
        {"w": (8, 6), "bias": (6,)},
        {"bias": int8},
        "none can be quantized: bias: no product, convolution or look-up uses it",
    ),
    "nothing at all": (
        lambda p, x: x * p["w"],
        {"w": (5, 8)},
        None,
        "there is nothing to quantize",
    ),
    "group": (
        matmul,
        {"w": (8, 6)},
        {"w": int4.grouped(3)},
        r"w \(8, 6\) cannot be int4 groups of 3: a group of 3 weights must divide the "
        r"summed dims \[8\] evenly.* among \[2, 4, 8\], or None",
    ),
    "group of a weight summed both ways": (
        lambda p, x: x @ p["w"] @ p["w"].T,
        {"w": (8, 6)},
        {"w": int4.grouped(2)},
        r"its uses sum over different ones: \[\(0,\), \(1,\)\]. Leave out the group",
    ),
    "overflow": (
        matmul,
        {"w": (LONGEST_SUM + 1, 1)},
        {"w": w8a8},
        f"limit is {LONGEST_SUM:,}.* Give it smaller groups",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    fn, shapes, formats, message = BAD[name]
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    x_shape = (5, shapes["w"][0]) if fn is matmul else (5, 8)
    x = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    with pytest.raises(ValueError, match=message) as e:
        quantize(fn, params, x, formats=formats)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_and_zeros_are_not(bad, normal):
    x = normal(5, 8)
    with pytest.raises(ValueError, match="2 of the 48 numbers of w are NaN or inf"):
        quantize(matmul, {"w": normal(8, 6).at[1, :2].set(bad)}, x)
    fn, q = quantize(matmul, {"w": jnp.zeros((8, 6))}, x)
    np.testing.assert_array_equal(fn(q, x), jnp.zeros((5, 6)))


def test_what_is_quantized_already_is_no_match(normal):
    params, x = {"w": normal(8, 6)}, normal(5, 8)
    fn, q = quantize(matmul, params, x)
    assert isinstance(q["w"], QArray)
    with pytest.raises(ValueError, match="w: it is quantized already"):
        quantize(fn, q, x, formats={"w": int4})


def two(normal):
    params = {"a": normal(8, 8), "b": normal(8, 4), "c": normal(4)}
    return lambda p, x: (x @ p["a"]) @ p["b"] @ p["c"], params, normal(2, 8)


def test_one_format_is_for_every_weight_of_two_dims(normal):
    fn, params, x = two(normal)
    _, q = quantize(fn, params, x, formats=int4)
    _, named = quantize(fn, params, x, formats={"{a,b}": int4})
    assert jax.tree.structure(q) == jax.tree.structure(named)
    assert q["a"].format == "int4"


def test_what_is_no_format_is_one_clear_line(normal):
    fn, params, x = two(normal)
    for formats in ("int4", {"a": "int4"}, 4):
        with pytest.raises(ValueError, match="a format is.*got .*4.*Pass one"):
            inspect.unwrap(quantize)(fn, params, x, formats=formats)


@pytest.mark.parametrize("formats", [None, int4, {"**": int4}])
def test_quantizing_twice_says_that_it_is_done_already(normal, formats):
    fn, params, x = two(normal)
    params.pop("c")
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    with pytest.raises(ValueError, match="quantized already.*all formats in one call"):
        quantize(*quantize(fn, params, x), x, formats=formats)


def test_weights_with_a_zero_point_meet_rounded_activations(normal):
    params, x = {"w": normal(64, 8)}, normal(32, 64)
    fn = lambda p, x: x @ p["w"]
    off = {}
    for fmt in (uint8, uint4):
        rounded = fmt.with_activations("int8")
        q_fn, q = quantize(fn, params, x, formats=rounded)
        y, want = q_fn(q, x), fn(params, x)
        off[fmt] = jnp.linalg.norm(y - want) / jnp.linalg.norm(want)
    # Half a step of 255 and of 15, and little for the activations.
    assert off[uint8] < 0.02 and 4 * off[uint8] < off[uint4] < 0.2


@pytest.mark.parametrize("sizes", [(4, 0, 3), (0, 4, 3)], ids=str)
def test_a_weight_of_no_numbers_stays(sizes):
    i, h, o = sizes
    params = {"a": jnp.ones((i, h)), "b": jnp.ones((h, o)), "c": jnp.ones((o, 2))}
    fn = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]
    x = jnp.ones((5, i))
    q_fn, q = quantize(fn, params, x)
    assert {path for path, w in q.items() if is_leaf(w)} == {
        path for path, w in params.items() if w.size
    }
    np.testing.assert_allclose(q_fn(q, x), fn(params, x), rtol=0.02)
    with pytest.raises(ValueError, match="none can be quantized: a: it has no numbers"):
        quantize(fn, params, x, formats={"a": int8})


def test_free_zero_points_are_for_the_formats_that_have_some(normal):
    params, x = {"a": normal(32, 16), "b": normal(16, 8)}, normal(4, 32)
    fn = lambda p, x: x @ p["a"] @ p["b"]
    formats = {"a": int8, "b": uint4}
    _, q = quantize(fn, params, x, formats=formats, fit="hqq")
    assert q["b"].zero.dtype == jnp.float16  # no integer
    _, mse = quantize(fn, params, x, formats=formats, fit="mse")
    np.testing.assert_array_equal(q["a"].scale, mse["a"].scale)
    for run in (quantize, functools.partial(awq, batches=[(x,)])):
        with pytest.raises(ValueError, match='"hqq" moves zero points, and int8 has'):
            run(fn, params, x, formats=int8, fit="hqq")


def test_patterns_that_do_nothing_are_errors():
    fn = lambda p, x: x @ p["a"] @ p["b"]
    params, x = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jnp.ones((2, 4))
    with pytest.raises(ValueError, match="those before 'b' match all it does. Put it"):
        quantize(fn, params, x, formats={"*": int4, "b": int8})
    quantize(fn, params, x, formats={"a": int4, "b": int8, "*": None})
    for formats in ({}, {"*": None}):
        with pytest.raises(ValueError, match="of the 2 weights none has a format"):
            quantize(fn, params, x, formats=formats)


def test_what_is_trained_to_be_rounded_is_quantized_already():
    fn = lambda p, x: x @ p["a"]
    trained_fn, trained = fake_quantize(fn, {"a": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="quantized already.*`convert` stores"):
        quantize(trained_fn, trained, jnp.ones((2, 4)))


def test_a_function_of_arrays_refuses_compressed_weights():
    model = nn.Dense(4)
    x = jnp.ones((2, 4))
    fn, new = quantize(model.apply, model.init(jax.random.key(0), x), x)
    with pytest.raises(TypeError, match="weight .QArray. was given .* came with it"):
        model.apply(new, x)
    fn(new, x)
