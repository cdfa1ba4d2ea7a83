"""What a compressed model is, as plain data, so that a checkpoint can hold it.

A compressed model is its arrays, the kind of leaf each of them belongs to, and
the plans it was shrunk by. The arrays go wherever arrays are saved; `describe`
says the rest in JSON, and `rebuild` makes of it, with the model's own function
and shapes, the compressed function and the shapes of its parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxeff import tree

from .call import inner
from .leaf import is_leaf, Leaf
from .lift import lift
from .resize import Plan, resize, Resized


def describe(fn: Callable, params: PyTree) -> dict[str, Any]:
    """What `rebuild` needs beside the model's own function and shapes, as JSON.

    Raises:
        ValueError: a field of a leaf is neither an array, a leaf, nor plain data.
    """
    leaves = tree.paths(params, is_leaf)
    plans, part = [], fn
    while part is not None:
        if isinstance(part, Resized):
            plans.append(part.plan.to_json())
        part = inner(part)
    return {
        "plans": plans[::-1],  # the first to be applied first
        "weights": {path: _leaf(x) for path, x in leaves.items() if is_leaf(x)},
    }


def rebuild(
    about: Mapping[str, Any], fn: Callable, params: PyTree
) -> tuple[Callable, PyTree]:
    """The function that was described, and the shapes of its parameters.

    Args:
        about: from `describe`.
        fn: the model's own function; any of its functions will do.
        params: the model's own parameters, or their shapes.

    Raises:
        ValueError: a weight that was compressed is not in `params`, or has another
            shape there.
    """
    arrays = {k: x for k, x in tree.paths(params).items() if tree.is_array(x)}
    sizes = {path: tuple(x.shape) for path, x in arrays.items()}
    for plan in map(Plan.from_json, about["plans"]):
        for path in plan.dims:
            _check(path, plan.shape(path, new=False), sizes)
            sizes[path] = plan.shape(path, new=True)
        fn = resize(fn, plan)
    leaves = {path: _rebuilt(leaf) for path, leaf in about["weights"].items()}
    for path, leaf in leaves.items():
        _check(path, tuple(leaf.shape), sizes)

    def shape(keypath, x):
        path = tree.path_name(keypath)
        if path in leaves:
            return leaves[path]
        return jax.ShapeDtypeStruct(sizes[path], x.dtype) if path in sizes else x

    params = jax.tree_util.tree_map_with_path(shape, params)
    return (lift(fn) if about["weights"] else fn), params


def _check(path: str, was: tuple[int, ...], sizes: Mapping[str, tuple]) -> None:
    if path not in sizes:
        raise ValueError(
            f"the checkpoint compresses {path}, which this model does not have. Build "
            "the model it was made of."
        )
    if sizes[path] != was:
        raise ValueError(
            f"{path} was compressed from shape {was}, but has shape {sizes[path]} in "
            "this model. Build the model the checkpoint was made of."
        )


def _leaf(x: Any) -> dict[str, Any]:
    if is_leaf(x):
        fields = {f.name: _leaf(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"leaf": type(x).__name__, "fields": fields}
    if tree.is_array(x):
        return {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name}
    if isinstance(x, tuple):
        return {"tuple": [_leaf(y) for y in x]}
    if x is None or isinstance(x, bool | int | float | str):
        return {"value": x}
    raise ValueError(
        "the fields of a leaf are arrays, leaves, numbers, strings and tuples of "
        f"these, got a {type(x).__name__}: store it as one of them."
    )


def _rebuilt(about: Mapping[str, Any]) -> Any:
    if "leaf" in about:
        kind = Leaf.kinds.get(about["leaf"])
        if kind is None:
            raise ValueError(
                f"no compressed weight is called {about['leaf']!r}: import the module "
                f"that defines it. Known: {', '.join(Leaf.kinds)}."
            )
        x = object.__new__(kind)  # around checks of values that are not there
        for name, value in about["fields"].items():
            object.__setattr__(x, name, _rebuilt(value))
        return x
    if "shape" in about:
        return jax.ShapeDtypeStruct(tuple(about["shape"]), jnp.dtype(about["dtype"]))
    if "tuple" in about:
        return tuple(map(_rebuilt, about["tuple"]))
    return about["value"]
