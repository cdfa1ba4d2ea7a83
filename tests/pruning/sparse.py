"""A small tree of weights, and optimizers of every make to prune it with."""

import functools

import jax
import jax.random as jr
import numpy as np
import optax

SHAPES = {"kernel": (16, 12), "bias": (12,), "deep": {"kernel": (3, 8, 6)}}
COVERED = ("kernel", "deep/kernel")


def example(key, dtype="float32"):
    """Weights, or gradients of them."""
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jr.split(key, len(leaves))
    arrays = [jr.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def _label(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "a" if "deep" in str(path) else "b", params
    )


def _kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9),
    "several": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)}, _label
    ),
    "part": optax.chain(optax.masked(optax.adam(1e-2), _kernels), optax.scale(0.5)),
}


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    """One step."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def at(tree, path):
    """The entry of a path."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def close(a, b):
    """Equal to rounding: two programs may fuse, and so round, in different ways."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=2e-5, atol=2e-6) for x, y in leaves)
