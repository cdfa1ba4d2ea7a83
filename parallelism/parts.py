"""How an array lies on a mesh, dim by dim, and how it is split once more."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding

# A mesh axis, several of them, or None for each dim.
Spec = tuple[Any, ...]


def spec_of(w: Any) -> Spec:
    """Of an array or its shape; where it is on no mesh, nothing is split."""
    sharding = getattr(w, "sharding", None)
    given = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return given + (None,) * (w.ndim - len(given))


def axes_of(weight: Any) -> set[str]:
    """The axes over which any array of a weight is split."""
    entries = [a for w in jax.tree.leaves(weight) for a in spec_of(w) if a]
    return {name for a in entries for name in ((a,) if isinstance(a, str) else a)}


def split_once_more(
    w: Any, axis: str, devices: int, least: int, dims: Iterable[int] | None = None
) -> Spec:
    """With its longest dim that is whole, and divides, split over an axis.

    Args:
        w: an array or its shape.
        axis, devices: of the mesh.
        least: with fewer numbers in `dims` it stays as it is.
        dims: those that may be split; all by default.
    """
    spec = spec_of(w)
    dims = list(range(w.ndim) if dims is None else dims)
    free = [d for d in dims if spec[d] is None and w.shape[d] % devices == 0]
    if devices == 1 or not free or math.prod(w.shape[d] for d in dims) < least:
        return spec
    longest = max(free, key=lambda d: w.shape[d])
    return tuple(axis if d == longest else a for d, a in enumerate(spec))


def put(w: Any, sharding: NamedSharding) -> Any:
    """An array on its devices, or the shape of one that lies there."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
    return jax.device_put(w, sharding)
