"""Takes indices away from weights, and from whatever is stored beside each weight."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from jaxeff import tree

from .couplings import Couplings
from .leaf import is_leaf, keep as keep_along

Keep = Mapping[str, Bool[np.ndarray, " _"]]


def keep_indices(params: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """The weights, compressed or not, without the indices that `keep` drops.

    Args:
        params: the weights that `couplings` was found for.
        couplings: of their program.
        keep: for couplings, by name, which indices stay (True).
    """
    touched = _touched(couplings, keep)

    def smaller(keypath, x):
        path = tree.path_name(keypath)
        return _cut(x, couplings.masks(path, keep)) if path in touched else x

    return jax.tree_util.tree_map_with_path(smaller, params, is_leaf=is_leaf)


def zero_indices(params: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """The weights, none compressed, with zeros at the indices that `keep` drops.

    Law: `resize` with `keep_indices` computes what the function as it was computes
    with these.
    """
    touched = _touched(couplings, keep)

    def masked(keypath, x):
        path = tree.path_name(keypath)
        if path not in touched:
            return x
        for d, mask in enumerate(couplings.masks(path, keep)):
            others = [i for i in range(x.ndim) if i != d]
            x = jnp.where(np.expand_dims(mask, others), x, 0)
        return x

    return jax.tree_util.tree_map_with_path(masked, params)


def keep_in_state(state: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """What is stored for each weight, without the indices that `keep` drops.

    An optimizer state, an average of the weights or a whole training state: an array
    belongs to the weight whose path its own path ends with (`0/mu/params/up/kernel`).
    It loses the weight's indices where it has the weight's shape, or some of its dims
    as the row and column statistics of Adafactor have; what has one element and what
    belongs to no weight stays.

    Args:
        state: any pytree.
        couplings: of the program of the weights.
        keep: for couplings, by name, which indices stay (True).

    Raises:
        ValueError: the dims of an array cannot be told to be those of its weight.
    """
    touched = _touched(couplings, keep)

    def smaller(keypath, x):
        name = tree.path_name(keypath)
        path = _owner(name, couplings)
        if path is None or path not in touched or np.prod(x.shape) == 1:
            return x
        return _cut(x, _masks_of(name, tuple(x.shape), path, couplings, keep))

    return jax.tree_util.tree_map_with_path(smaller, state, is_leaf=is_leaf)


def _owner(name: str, couplings: Couplings) -> str | None:
    """The weight that an array is stored for: the longest path its own ends with."""
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in couplings.dims), None)


def _masks_of(
    name: str, shape: tuple[int, ...], path: str, couplings: Couplings, keep: Keep
) -> list[Bool[np.ndarray, " _"]]:
    """The masks of the dims of an array that has some dims of a weight, in order."""
    masks = couplings.masks(path, keep)
    ways = [
        [masks[d] for d in dims]
        for dims in itertools.combinations(range(len(masks)), len(shape))
        if tuple(len(masks[d]) for d in dims) == shape
    ]
    same = lambda way: all(map(np.array_equal, way, ways[0]))
    if not ways or not all(map(same, ways)):
        weight = tuple(map(len, masks))
        what = "could be several of" if ways else "are not among"
        raise ValueError(
            f"what is stored for a weight loses the indices that the weight loses, but "
            f"the dims {shape} of {name} {what} those of {path}, {weight}. Start it "
            "anew from the smaller weights."
        )
    return ways[0]


def _touched(couplings: Couplings, keep: Keep) -> set[str]:
    return {p for c in couplings if c.name in keep for p, _ in c.members}


def _cut(x: Any, masks: Sequence[Bool[np.ndarray, " _"]]) -> Any:
    for d, mask in enumerate(masks):
        if not mask.all():
            x = keep_along(x, d, mask)
    return x
