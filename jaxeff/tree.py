"""Trees of weights: names for their leaves, patterns over the names, two-way splits.

Everything in jaxeff speaks of a weight by its *path*, `params/Dense_0/kernel`,
and of several by a *pattern*, a glob over paths (`**/kernel`). This module
knows nothing of models, programs or compression.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast, dataclass_transform, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr
from jaxtyping import PyTree

T = TypeVar("T")
Patterns = str | Sequence[str]


def static(**kwargs: Any) -> Any:
    """A field of a `pytree` that is part of its structure, not one of its arrays."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Frozen dataclass that is a pytree: its fields are children, or `static()`.

    JAX rebuilds pytrees with whatever it likes in the leaves (tracers, shapes,
    `None`), so rebuilding goes around `__init__` and its checks.

    Law: unflatten(flatten(x)) equals x, field by field.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cast(Any, cls))
    children = [f.name for f in fields if not f.metadata.get("static")]
    fixed = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(x):
        keyed = [(GetAttrKey(n), getattr(x, n)) for n in children]
        return keyed, tuple(getattr(x, n) for n in fixed)

    def flatten(x):
        return [getattr(x, n) for n in children], tuple(getattr(x, n) for n in fixed)

    def unflatten(aux, leaves):
        x = object.__new__(cls)
        for name, value in zip(fixed, aux, strict=True):
            object.__setattr__(x, name, value)
        for name, value in zip(children, leaves, strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def path_name(keypath: tuple) -> str:
    """`params/Dense_0/kernel` for the key path JAX gives for that leaf."""
    return keystr(keypath, simple=True, separator="/")


def paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf of `tree` by its path, in the order JAX flattens it.

    Raises:
        ValueError: two leaves have the same path (`{"a/b": x, "a": {"b": y}}`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    named = {path_name(keypath): leaf for keypath, leaf in leaves}
    if len(named) < len(leaves):
        names = [path_name(keypath) for keypath, _ in leaves]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(
            f"{names.count(twice)} weights are called {twice}: a path must name one. "
            "Rename a key, or leave `/` out of it."
        )
    return named


def replaced(
    tree: PyTree,
    new: Mapping[str, Any],
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """`tree` with the leaves at some paths replaced; others stay."""
    one = lambda keypath, x: new.get(path_name(keypath), x)
    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)


def _regex(pattern: str) -> re.Pattern[str]:
    # `**/` is any number of whole components (also none); `*` stays inside one.
    tokens = {
        "**/": "(?:.*/)?",
        "/**": "(?:/.*)?",
        "**": ".*",
        "*": "[^/]*",
        "?": "[^/]",
    }
    split = re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?|\{[^{}]*\})", pattern)

    def translate(token: str) -> str:
        if token.startswith("{") and token.endswith("}"):
            return f"(?:{'|'.join(map(re.escape, token[1:-1].split(',')))})"
        return tokens.get(token, re.escape(token))

    return re.compile("".join(map(translate, split)))


def match(
    patterns: Patterns, names: Iterable[str], *, what: str = "weight"
) -> list[str]:
    """The names that some pattern matches, in their own order.

    Args:
        patterns: one glob or several. `*` matches within one component of a
            path, `**` across components, `{up,down}` either word.
        names: the paths to choose from.
        what: what a name stands for, for the error message.

    Raises:
        ValueError: a pattern matches nothing. A rule that silently does
            nothing is the field's commonest bug.
    """
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    hit: set[str] = set()
    for pattern in patterns:
        regex = _regex(pattern)
        found = [n for n in names if regex.fullmatch(n)]
        if not found:
            raise ValueError(_no_match(pattern, names, what))
        hit.update(found)
    return [n for n in names if n in hit]


def check_some(
    patterns: Iterable[str], reasons: Mapping[str, str], *, does: str, way_out: str
) -> None:
    """Refuses a pattern of which all weights have to stay as they are.

    Args:
        patterns: globs over paths.
        reasons: for each weight why it stays; empty where it does not.
        does: what is done to weights, "prunes".
        way_out: a sentence for the message.

    Raises:
        ValueError: there is such a pattern, or one matches nothing.
    """
    for pattern in patterns:
        matched = match(pattern, reasons)
        if all(reasons[path] for path in matched):
            said = "; ".join(f"{path}: {reasons[path]}" for path in matched[:3])
            raise ValueError(
                f"pattern {pattern!r} {does} none of the {len(matched)} weights it "
                f"matches: {said}{' ...' * (len(matched) > 3)}. {way_out}"
            )


def _no_match(pattern: str, names: list[str], what: str) -> str:
    if not names:
        return f"pattern {pattern!r} matches no {what}: there is none to match."
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
    return (
        f"pattern {pattern!r} matches none of the {len(names)} {what}s. "
        f"Nearest: {', '.join(near)}. `**` matches any number of path components."
    )


def assign(
    rules: Mapping[str, T], names: Iterable[str], *, what: str = "weight"
) -> dict[str, T]:
    """Gives each name the value of the *first* pattern that matches it.

    Raises:
        ValueError: a pattern matches no name.
    """
    names = list(names)
    chosen: dict[str, T] = {}
    for pattern, value in rules.items():
        for name in match(pattern, names, what=what):
            chosen.setdefault(name, value)
    return {n: chosen[n] for n in names if n in chosen}


def is_array(x: Any) -> bool:
    """Whether JAX can trace `x`: an array, a tracer, or the shape of one."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def dtype_name(dtype: Any) -> str:
    """`float32`; of a typed random key, which NumPy does not know, `key<fry>`."""
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    return str(dtype) if extended else jnp.dtype(dtype).name


def partition(params: PyTree, trainable: Patterns = "**") -> tuple[PyTree, PyTree]:
    """Splits a tree into what trains and what stays, `None` where the other has it.

    Only floating-point and complex arrays of 16 bits or more train, so integers and
    8-bit floats (the values and scales of quantized leaves, a step counter) never
    reach `grad`.

    Law: combine(*partition(params, p)) equals params.

    Raises:
        ValueError: a pattern matches no weight, or nothing is left to train.
    """
    names = set(match(trainable, paths(params)))
    trains = lambda keypath, x: (
        path_name(keypath) in names
        and is_array(x)
        and jnp.issubdtype(x.dtype, jnp.inexact)
        and jnp.finfo(x.dtype).bits >= 16
    )
    keep = jax.tree_util.tree_map_with_path(trains, params)
    if not any(jax.tree.leaves(keep)):
        raise ValueError(
            f"nothing to train: the {len(names)} weights that match {trainable!r} hold "
            "no floating-point array of 16 bits or more."
        )
    train = jax.tree.map(lambda k, x: x if k else None, keep, params)
    frozen = jax.tree.map(lambda k, x: None if k else x, keep, params)
    return train, frozen


def combine(train: PyTree, frozen: PyTree) -> PyTree:
    """Puts the two halves of `partition` together again."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, train, frozen, is_leaf=lambda x: x is None)


def split_static(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The arrays of a tree, and the function that puts new ones in their places.

    What JAX cannot trace (flags, strings, functions) stays where it is.
    """
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if is_array(x)]

    def fill(arrays: Sequence[Any]) -> PyTree:
        filled = list(leaves)
        for i, x in zip(where, arrays, strict=True):
            filled[i] = x
        return jax.tree.unflatten(treedef, filled)

    return [leaves[i] for i in where], fill


def tree_size(tree: PyTree) -> int:
    """Number of array elements in a tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree) if is_array(x))


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the arrays of a tree take, as they are stored."""
    arrays = [x for x in jax.tree.leaves(tree) if is_array(x)]
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays)
