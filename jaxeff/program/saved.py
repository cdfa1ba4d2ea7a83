"""What a compressed model is, as plain data, so that a checkpoint can hold it.

A compressed model is its arrays, the kind of leaf each of them belongs to, and how
its function was rewritten. The arrays go wherever arrays are saved; `describe` says
the rest in JSON, and `rebuild` makes of it, with the model's own function and
shapes, the compressed function and the shapes of its parameters.

Kinds are named by their modules. Of these `rebuild` imports those of jaxeff alone:
a file must not decide what code runs.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxeff import tree

from .call import inner, Rewritten
from .hidden import hidden_rewrite
from .leaf import is_leaf, Leaf
from .lift import lift, Lifted
from .resize import Plan, Resized

T = TypeVar("T")


def describe(fn: Callable, params: PyTree) -> dict[str, Any]:
    """What `rebuild` needs beside the model's own function and shapes, as JSON.

    Raises:
        ValueError: `fn` is no function; it is one that calls a rewritten one, which
            would be lost; it is rewritten in a way, or a leaf has a field, that JSON
            cannot hold.
    """
    if not callable(fn):
        raise ValueError(
            f"a model is a function and its parameters, in this order, but the first "
            f"is a {type(fn).__name__}. Exchange them, or pass the function."
        )
    rewrites, part, own = [], fn, fn
    while part is not None:
        if isinstance(part, Rewritten):
            kind = {"kind": type(part).__name__, "module": type(part).__module__}
            rewrites.append({**kind, "settings": part.settings()})
        part, own = inner(part), part
    lost = hidden_rewrite(own)
    if lost is not None:
        raise ValueError(
            f"a function is saved as what was done to it, but {_name(own)} calls one "
            f"that was changed by {type(lost).__name__} in a way that cannot be seen "
            "through. Save the function that the technique returned; `jax.jit`, and "
            "functools.partial with keywords alone, may be around it."
        )
    leaves = tree.paths(params, is_leaf)
    return {
        "rewrites": rewrites[::-1],  # the first to be applied first
        "weights": {path: _leaf(x) for path, x in leaves.items() if is_leaf(x)},
    }


def is_original(about: Mapping[str, Any]) -> bool:
    """Whether what `describe` returned is of a model that nothing was done to."""
    return not about["rewrites"] and not about["weights"]


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
            shape there; or a kind of leaf is defined in a module outside of jaxeff
            that was not imported.
    """
    arrays = {k: x for k, x in tree.paths(params).items() if tree.is_array(x)}
    sizes = {path: tuple(x.shape) for path, x in arrays.items()}
    new, lifted = fn, False
    for step in about["rewrites"]:
        kind = _kind(Rewritten.kinds, step["kind"], step["module"])
        new = kind.restored(new, step["settings"])
        if isinstance(new, Resized):
            _resize(sizes, new.plan)
        lifted = lifted or isinstance(new, Lifted)
    leaves = {path: _rebuilt(leaf) for path, leaf in about["weights"].items()}
    for path, leaf in leaves.items():
        _check(path, tuple(leaf.shape), sizes)

    def shape(keypath, x):
        path = tree.path_name(keypath)
        if path in leaves:
            return leaves[path]
        return jax.ShapeDtypeStruct(sizes[path], x.dtype) if path in sizes else x

    params = jax.tree_util.tree_map_with_path(shape, params)
    return (lift(new) if leaves and not lifted else new), params


def _resize(sizes: dict[str, tuple[int, ...]], plan: Plan) -> None:
    for path in plan.dims:
        _check(path, plan.shape(path, new=False), sizes)
        sizes[path] = plan.shape(path, new=True)


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


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)


def _kind(kinds: Mapping[str, type[T]], name: str, module: str) -> type[T]:
    """The class of that name, if need be from a module of jaxeff not imported yet."""
    full = f"{module}.{name}"
    if full not in kinds and module.split(".")[0] == "jaxeff":
        try:
            importlib.import_module(module)
        except ImportError:
            pass  # it may have moved since; its package is imported now
    # Of another module where there is one alone: a class of a script, say.
    same = [full] if full in kinds else [k for k in kinds if k.split(".")[-1] == name]
    if len(same) != 1:
        raise ValueError(
            f"the checkpoint holds a {name} of {module}, which is not known here: "
            f"import {module} before loading it."
        )
    return kinds[same[0]]


def _leaf(x: Any) -> dict[str, Any]:
    if is_leaf(x):
        fields = {f.name: _leaf(getattr(x, f.name)) for f in dataclasses.fields(x)}
        kind = type(x)
        return {"leaf": kind.__name__, "module": kind.__module__, "fields": fields}
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
        kind = _kind(Leaf.kinds, about["leaf"], about["module"])
        x = object.__new__(kind)  # around checks of values that are not there
        for name, value in about["fields"].items():
            object.__setattr__(x, name, _rebuilt(value))
        return x
    if "shape" in about:
        return jax.ShapeDtypeStruct(tuple(about["shape"]), jnp.dtype(about["dtype"]))
    if "tuple" in about:
        return tuple(map(_rebuilt, about["tuple"]))
    return about["value"]
