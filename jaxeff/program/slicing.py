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
from .leaf import dense, is_leaf, keep as keep_along
from .owners import owners

Keep = Mapping[str, Bool[np.ndarray, " _"]]


def keep_indices(params: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """The weights, compressed or not, without the indices that `keep` drops.

    Args:
        params: the weights that `couplings` was found for.
        couplings: of their program.
        keep: for couplings, by name, which indices stay (True).

    Raises:
        ValueError: none of the weights is there that lose something, or one has
            another shape.
    """
    touched = _touched(couplings, keep)
    there = tree.paths(params, is_leaf)
    if touched and not touched & there.keys():
        raise ValueError(
            f"these are not the weights of the function: there is no "
            f"{sorted(touched)[0]} among {', '.join([*there][:3])} ... Pass the tree "
            "that it was traced with."
        )
    for path in sorted(touched & there.keys()):
        want = tuple(map(len, couplings.masks(path, keep)))
        if (got := tuple(there[path].shape)) != want:
            raise ValueError(
                f"{path} loses indices of {want}, but has the shape {got}: these are "
                "not the weights that were chosen from, or they were taken before."
            )

    def smaller(keypath, x):
        path = tree.path_name(keypath)
        return _cut(x, couplings.masks(path, keep)) if path in touched else x

    return jax.tree_util.tree_map_with_path(smaller, params, is_leaf=is_leaf)


def zero_indices(params: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """The weights, dense, with zeros at the indices that `keep` drops.

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

    return jax.tree_util.tree_map_with_path(masked, dense(params))


def keep_in_state(state: PyTree, couplings: Couplings, keep: Keep) -> PyTree:
    """What is stored for each weight, without the indices that `keep` drops.

    An optimizer state, an average of the weights or a whole training state. Which array
    is of which weight their paths tell (`owners`), also where the state is of a part of
    the weights (`tx.init(variables["params"])`). An array loses the weight's indices
    where it has the weight's shape, or some of its dims as the row and column
    statistics of Adafactor have; what has one element and what belongs to no weight
    stays.

    Args:
        state: any pytree.
        couplings: of the program of the weights.
        keep: for couplings, by name, which indices stay (True).

    Raises:
        ValueError: no array is of a weight, one could be of several, or its dims
            cannot be told to be those of its weight.
    """
    touched = _touched(couplings, keep)
    arrays = {
        name: tuple(x.shape)
        for name, x in tree.paths(state, is_leaf).items()
        if hasattr(x, "shape")
    }
    large = {name: s for name, s in arrays.items() if np.prod(s) != 1}
    fits = lambda name, path: bool(_ways(arrays[name], couplings.masks(path, keep)))
    owned = owners(arrays, couplings.dims, fits)
    if large and not any(owned.values()):
        raise ValueError(
            "what is stored for a weight is found by the weight's path, but none of "
            f"the {len(large)} arrays here, {next(iter(large))} among them, ends "
            f"with one like {next(iter(couplings.dims))}. Make the state of the "
            "weights that the function takes."
        )

    def smaller(keypath, x):
        name = tree.path_name(keypath)
        paths = owned.get(name, [])
        if name not in large or not touched.intersection(paths):
            return x
        if len(paths) > 1:
            raise ValueError(
                f"what is stored for a weight is found by the weight's path, but "
                f"{name} could be of {' or '.join(paths[:3])}. Make the state of all "
                "weights that the function takes."
            )
        return _cut(x, _masks_of(name, arrays[name], paths[0], couplings, keep))

    return jax.tree_util.tree_map_with_path(smaller, state, is_leaf=is_leaf)


def _ways(
    shape: tuple[int, ...], masks: Sequence[Bool[np.ndarray, " _"]]
) -> list[list[Bool[np.ndarray, " _"]]]:
    """The masks of an array that has some dims of a weight, in order: every choice."""
    return [
        [masks[d] for d in dims]
        for dims in itertools.combinations(range(len(masks)), len(shape))
        if tuple(len(masks[d]) for d in dims) == shape
    ]


def _masks_of(
    name: str, shape: tuple[int, ...], path: str, couplings: Couplings, keep: Keep
) -> list[Bool[np.ndarray, " _"]]:
    """The masks of the dims of an array that is stored for a weight."""
    masks = couplings.masks(path, keep)
    ways = _ways(shape, masks)
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
