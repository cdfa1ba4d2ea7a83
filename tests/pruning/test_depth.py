"""Whole residual branches: which there are, which leave, and what is left."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff import trace, tree
from jaxeff.models import GPT, ResNet
from jaxeff.pruning import branches, select_depth
from tests.zoo import draw

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_branches_of_a_model_are_its_residual_ones[gpt]",
    "test_the_branches_of_a_model_are_its_residual_ones[resnet]",
}


def stack(p, x):
    """Three residual branches, one after another."""
    for w in p["blocks"]:
        x = x + jnp.tanh(x @ w["up"]) @ w["down"]
    return x @ p["head"]


def weights(sizes=(1.0, 1e-3, 0.5)):
    keys = iter(jr.split(jr.key(0), 7))
    block = lambda s: {
        "up": jr.normal(next(keys), (4, 6)),
        "down": s * jr.normal(next(keys), (6, 4)),
    }
    head = jr.normal(next(keys), (4, 2))
    return {"blocks": [block(s) for s in sizes], "head": head}


X = jr.normal(jr.key(1), (8, 4))


def test_branches_come_in_the_order_in_which_they_matter():
    params = weights()
    found = branches(stack, params, X, batches=[(X,)])
    assert [b.weights[0] for b in found] == [
        "blocks/1/down",
        "blocks/2/down",
        "blocks/0/down",
    ]
    without = {**params, "blocks": [params["blocks"][0], params["blocks"][2]]}
    off = stack(without, X) - stack(params, X)
    expected = (off**2).sum() / (stack(params, X) ** 2).sum()
    assert jnp.allclose(found[0].error, expected, rtol=1e-3)


def test_what_leaves_is_gone_and_the_rest_computes_as_before():
    params = weights()
    chosen = select_depth(stack, params, X, drop=2, batches=[(X,)])
    fn, small = chosen.resize(stack), chosen.take(params)
    assert tree.tree_size(small) == 2 * 24 // 2 + 24 + 8
    first = {"blocks": params["blocks"][:1], "head": params["head"]}
    y = jr.normal(jr.key(2), (3, 4))
    assert jnp.allclose(jax.jit(fn)(small, y), stack(first, y), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_the_branches_of_a_model_are_its_residual_ones(name, getkey):
    if name == "gpt":
        model, x = GPT(16, 8, 8, 2, 2), jr.randint(getkey(), (2, 6), 0, 16)
        parts = 4  # an attention and an mlp in each of two blocks
    else:
        model, x = (
            ResNet(depth=8, width=4, classes=5),
            jr.normal(getkey(), (2, 8, 8, 3)),
        )
        parts = 3
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    found = branches(model.apply, params, x, batches=[(x,)])
    assert len(found) == parts
    chosen = select_depth(model.apply, params, x, drop=parts - 1, batches=[(x,)])
    fn, small = chosen.resize(model.apply), chosen.take(params)
    want = model.apply(chosen.zeroed(params), x)
    assert jnp.allclose(fn(small, x), want, rtol=1e-4, atol=1e-4 * jnp.abs(want).max())
    flops = lambda fn, p: trace(fn, p, x).costs.flops
    assert flops(fn, small) < flops(model.apply, params)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drop": 4}, "of which there are 3 here, got 4"),
        ({"drop": 0}, "got 0"),
        ({"drop": 1, "only": "head"}, "no branch"),
        ({"drop": 1, "only": "x"}, "Nearest"),
        ({"drop": 1, "batches": []}, "at least one batch"),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        select_depth(stack, weights(), X, **({"batches": [(X,)]} | options))
