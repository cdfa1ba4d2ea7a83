import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxeff.models import build
from jaxeff.pruning import NofM, one_shot, prune, Unstructured, weight_dims

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_whole_transformer_becomes_2_of_4_where_it_multiplies[False]",
}


def test_dims_are_those_that_products_sum_over(normal):
    """A table, a convolution, a product by heads, a stack in a scan, a transpose."""
    params = {
        "table": normal(11, 8),
        "conv": normal(3, 3, 8, 16),
        "heads": normal(16, 4, 6),
        "out": normal(4, 6, 16),
        "stack": normal(5, 16, 16),
        "back": normal(7, 16),
    }

    def fn(params, tokens):
        x = jnp.take(params["table"], tokens, axis=0)
        x = lax.conv_general_dilated(
            x,
            params["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jnp.einsum("bhwd,dnk->bhwnk", x, params["heads"])
        x = jnp.einsum("bhwnk,nkd->bhwd", x, params["out"])
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return x @ params["back"].T

    dims = weight_dims(fn, params, jnp.zeros((2, 4, 4), int))
    assert dims.contract == {
        "conv": (0, 1, 2),
        "heads": (0,),
        "out": (0, 1),
        "stack": (1,),
        "back": (1,),
    }
    assert dims.output["heads"] == (1, 2) and dims.output["back"] == (0,)
    assert dims.stacked["stack"] == (0,)
    assert not any(d for path, d in dims.stacked.items() if path != "stack")


def test_a_weight_that_is_used_in_two_ways_is_left_out(normal):
    params = {"a": normal(4, 4), "b": normal(4, 4)}
    fn = lambda p, x: x @ p["a"] @ p["b"] @ p["a"].T
    assert weight_dims(fn, params, normal(2, 4)).contract == {"b": (0,)}
    with pytest.raises(ValueError, match="no weight of this function takes part"):
        weight_dims(lambda p, x: x + p["a"], params, normal(4, 4))


@pytest.mark.parametrize("scan", [False, True])
def test_a_whole_transformer_becomes_2_of_4_where_it_multiplies(scan):
    """Scanned or not: along what each product sums over, in every layer."""
    model = build("llama", vocab_size=40, d_model=16, hidden=32, n_layers=2, scan=scan)
    tokens = jnp.zeros((1, 8), int)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    dims = weight_dims(model.apply, params, tokens)
    paths = list(dims.contract)
    tx = prune(
        optax.sgd(0.1), one_shot(0.5), only=paths, pattern=NofM(2, 4, dims.contract)
    )
    update = jax.jit(tx.update)
    _, state = update(params, jax.jit(tx.init)(params), params)
    masks = {
        jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(m)
        for k, m in jax.tree_util.tree_leaves_with_path(state.mask)
    }
    assert set(masks) == set(paths) and len(paths) >= 5
    for path, mask in masks.items():
        last = np.moveaxis(
            mask, dims.contract[path], range(-len(dims.contract[path]), 0)
        )
        assert np.all(last.reshape(-1, 4).sum(1) == 2)
    stacked = Unstructured(per=dims.stacked)
    tx = prune(optax.sgd(0.1), one_shot(0.75), only=paths, pattern=stacked)
    _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    for path, mask in jax.tree_util.tree_leaves_with_path(state.mask):
        layers = dims.stacked[jax.tree_util.keystr(path, simple=True, separator="/")]
        if layers:
            along = tuple(d for d in range(mask.ndim) if d not in layers)
            kept = np.asarray(mask).mean(axis=along)
            assert np.all(kept == kept.flat[0])
