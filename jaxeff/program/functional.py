"""A model object as the pair that everything in jaxeff takes: `fn, params`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from jaxeff import tree


def functional(model: Any) -> tuple[Callable, PyTree]:
    """`(fn, params)` of an NNX module, an Equinox module, or any callable pytree.

    `fn(params, *args, **kwargs)` calls the model with those weights and changes
    nothing: what an NNX model writes into itself (batch statistics, counters)
    is lost, so put it into evaluation mode first (`model.eval()`). A Linen
    module is such a pair already: `model.apply, variables`.

    Raises:
        ValueError: `model` cannot be called, or holds no array.
    """
    if not callable(model):
        raise ValueError(
            f"a model is called with its inputs, but {type(model).__name__} is not "
            "callable. Pass a function and its parameters instead."
        )
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)

        def call(params, *args, **kwargs):
            full = jax.tree.map(lambda x: x, state)  # a copy: the next line fills it
            nnx.replace_by_pure_dict(full, params)
            return nnx.merge(graph, full)(*args, **kwargs)

        # A plain dict, so that a path ends in `kernel` and not in `kernel/value`.
        return call, nnx.to_pure_dict(state)
    arrays = jax.tree.map(lambda x: x if tree.is_array(x) else None, model)
    if not jax.tree.leaves(arrays):
        raise ValueError(
            f"{type(model).__name__} holds no array that JAX can see: a Linen module "
            "is the pair `model.apply, model.init(key, x)`; a class of yours must be "
            "a pytree."
        )
    others = jax.tree.map(lambda x: None if tree.is_array(x) else x, model)
    return lambda params, *a, **k: tree.combine(params, others)(*a, **k), arrays
