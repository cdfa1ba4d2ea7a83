import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.pruning import (
    erdos_renyi,
    erk,
    global_ranking,
    layer_sparsities,
    make_masks,
    NofM,
    uniform,
    Unstructured,
)

SHAPES = {"a": (3, 3, 8, 64), "b": (3, 3, 64, 64), "c": (64, 256), "d": (256, 10)}


def density(shape, name):
    shape = shape[-2:] if name == "er" else shape
    return sum(shape) / math.prod(shape)


@pytest.mark.parametrize(("name", "rule"), [("er", erdos_renyi), ("erk", erk)])
@given(sparsity=st.floats(0.05, 0.98))
def test_layers_share_by_shape_and_the_whole_has_its_sparsity(name, rule, sparsity):
    found = layer_sparsities(SHAPES, sparsity, rule)
    size = {n: math.prod(s) for n, s in SHAPES.items()}
    dropped = sum(found[n] * size[n] for n in SHAPES)
    assert abs(dropped - sparsity * sum(size.values())) <= len(SHAPES)
    # Of layers that are not dense the density is in one proportion to the paper's;
    # a dense one would have more than it can by that proportion.
    share = {n: (1 - found[n]) / density(s, name) for n, s in SHAPES.items()}
    sparse = [share[n] for n in SHAPES if found[n] > 0]
    c = np.mean(sparse)
    unit = max(1 / (size[n] * density(s, name)) for n, s in SHAPES.items())
    assert np.all(np.abs(np.array(sparse) - c) <= 2 * unit + 1e-4 * c)
    for n, s in SHAPES.items():
        assert found[n] > 0 or c * density(s, name) >= 1 - 2 * unit


def test_erk_leaves_layers_dense_where_their_share_is_more_than_they_have():
    found = layer_sparsities(SHAPES, 0.5, erk)
    assert found["d"] == 0 and found["b"] > 0.5
    assert layer_sparsities(SHAPES, 0.0, erk) == dict.fromkeys(SHAPES, 0)
    with pytest.raises(ValueError, match="looks at the scores"):
        layer_sparsities(SHAPES, 0.5, global_ranking)


def test_uniform_gives_all_the_same():
    found = layer_sparsities(SHAPES, 0.75, uniform)
    assert found == dict.fromkeys(SHAPES, 0.75)


def test_the_layers_of_a_stack_have_the_shape_of_one(normal):
    w = {"stack": normal(5, 8, 16), "alone": normal(8, 16), "other": normal(64, 64)}
    pattern = Unstructured(per={"stack": 0})
    scores = jax.tree.map(jnp.abs, w)
    masks = make_masks(scores, 0.8, pattern=pattern, distribution=erk)
    dropped = np.asarray((~masks["stack"]).sum((1, 2)))
    assert np.all(dropped == int((~masks["alone"]).sum()))


@given(seed=st.integers(0, 99), sparsity=st.floats(0, 0.99))
def test_one_threshold_drops_the_smallest_of_all(seed, sparsity):
    rng = np.random.default_rng(seed)
    w = {"a": rng.normal(size=(6, 7)), "b": 3 * rng.normal(size=(5, 4, 3))}
    scores = {n: jnp.asarray(np.abs(x), jnp.float32) for n, x in w.items()}
    masks = make_masks(scores, sparsity, distribution=global_ranking)
    kept = np.concatenate([np.asarray(masks[n]).ravel() for n in w])
    flat = np.concatenate([np.asarray(scores[n]).ravel() for n in w])
    assert (~kept).sum() == np.round(np.float32(sparsity) * np.float32(102))
    if 0 < kept.sum() < 102:
        assert flat[kept].min() >= flat[~kept].max()


@pytest.mark.parametrize("rule", [erk, erdos_renyi, global_ranking])
def test_groups_have_one_sparsity_so_other_distributions_are_refused(rule, normal):
    scores = {"w": jnp.abs(normal(4, 8))}
    with pytest.raises(ValueError, match=r"\bw\b.*Use `uniform`"):
        make_masks(scores, 0.5, pattern=NofM(2, 4, 0), distribution=rule)
