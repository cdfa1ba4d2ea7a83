"""What a compressed model is, as JSON, makes the same model again."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxeff.lowrank import factorize
from jaxeff.program import describe, is_leaf, lift, rebuild, resize
from jaxeff.pruning import shrink
from jaxeff.quantization import int4, int8, quantize
from tests.zoo import ZOO

CASES = {case.name: case for case in ZOO}


def shapes(params):
    return jax.eval_shape(lambda: params)


def same(a, b):
    """Structures with their static fields, shapes and dtypes."""
    form = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    return form(a) == form(b) and jax.tree.structure(a) == jax.tree.structure(b)


def in_every_way(fn, params, args):
    fn, params = shrink(fn, params, *args)
    fn, params = factorize(fn, params, *args, ranks={"**": 1})
    fn, params = shrink(fn, params, *args, keep=0.75)
    return quantize(fn, params, *args, formats={"**": int4})


@pytest.mark.parametrize(
    "compress",
    [
        lambda fn, params, args: (fn, params),
        lambda fn, params, args: shrink(fn, params, *args),
        lambda fn, params, args: quantize(fn, params, *args, formats={"**": int8}),
        in_every_way,
    ],
    ids=["dense", "shrunk", "int8", "in every way"],
)
@pytest.mark.parametrize("name", ["linen_mlp", "plain_transformer"])
def test_rebuilding_gives_the_same_tree_and_function(name, compress, getkey):
    fn, params, args = CASES[name].build(getkey())
    small_fn, small = compress(fn, params, args)
    about = json.loads(json.dumps(describe(small_fn, small)))
    again, like = rebuild(about, fn, shapes(params))
    assert same(shapes(small), like)
    expected, got = small_fn(small, *args), again(small, *args)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
    assert all(jnp.array_equal(a, b) for a, b in pairs)
    assert any(map(is_leaf, jax.tree.leaves(small, is_leaf=is_leaf))) == bool(
        about["weights"]
    )


def test_a_model_without_the_compressed_weights_is_refused(getkey):
    fn, params, args = CASES["linen_mlp"].build(getkey())
    about = describe(*quantize(fn, params, *args))
    other, weights, _ = CASES["plain_mlp"].build(getkey())
    with pytest.raises(ValueError, match="does not have"):
        rebuild(about, other, shapes(weights))


def test_an_unknown_kind_of_leaf_is_named(getkey):
    fn, params, args = CASES["linen_mlp"].build(getkey())
    about = describe(*quantize(fn, params, *args))
    for weight in about["weights"].values():
        weight["leaf"] = "Origami"
    with pytest.raises(ValueError, match="Origami"):
        rebuild(about, fn, shapes(params))


def test_an_empty_plan_and_a_second_lift_change_nothing(getkey):
    fn, params, args = CASES["linen_mlp"].build(getkey())
    small_fn, small = shrink(fn, params, *args, keep=1.0)
    assert small_fn is fn
    assert lift(lift(fn)) is not fn and lift(lift(fn)) == lift(fn)
    plan_fn, _ = shrink(fn, params, *args)
    assert resize(fn, plan_fn.plan).plan == plan_fn.plan
