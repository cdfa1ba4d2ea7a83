"""Stores pruned weights in less: exact zeros become leaves where that is smaller."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util
import numpy as np
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import (
    dense,
    is_leaf,
    lift,
    lift_report,
    notes,
    shapes,
    Site,
    table,
    trace,
    unlift,
)

from .block_sparse import block_array, block_cells
from .sparse import bitmask_array, nm_array

NEIGHBOURS = (2, 4, 8, 16)  # the M of the patterns N:M that are looked for
BLOCKS = (32, 16, 8)  # sides of the blocks that are looked for


def compact(
    fn: Callable, params: PyTree, *args: Any, only: tree.Patterns | None = None
) -> tuple[Callable, PyTree]:
    """The function, and its pruned weights stored without their zeros.

    Each weight takes the smallest of these: as it is; N of M neighbours with their
    places (`NMArray`); whole blocks (`BlockArray`); the nonzeros and a bit for each
    element (`BitmaskArray`). Among equals the first, which multiplies best.

    Law: the function computes what it did with the dense weights.

    Args:
        fn: `fn(params, *args)`.
        params: its weights; compressed ones stay.
        args: example inputs, or their shapes.
        only: patterns of the weights to look at; by default all that a product,
            convolution or look-up uses.

    Returns:
        `lift(fn)`, and the new weights.

    Raises:
        ValueError: a pattern matches no weight, or no weight would be smaller.
    """
    chosen = _choose(fn, params, args, only)
    if not any(c.make for c in chosen.values()):
        sparsest = max(chosen.values(), key=lambda c: c.sparsity, default=None)
        found = (
            ""
            if sparsest is None
            else (f": the sparsest, {sparsest.path}, is {sparsest.sparsity:.0%} zeros")
        )
        raise ValueError(
            f"no weight would be smaller without its zeros{found}. Prune first."
        )
    return lift(fn), _compacted(params, chosen)


@dataclasses.dataclass(frozen=True)
class Compacted:
    """What becomes of one weight.

    Attributes:
        path: of the weight.
        shape: of the array it stands for.
        sparsity: the fraction of exact zeros in it.
        format: what it is stored as.
        bytes: as it is stored then.
        dense_bytes: as an array.
        note: why it stays, or where it runs as a dense array.
        make: stores the array in that format; None: it stays.
    """

    path: str
    shape: tuple[int, ...]
    sparsity: float
    format: str
    bytes: int
    dense_bytes: int
    note: str = ""
    make: Callable | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class CompactReport:
    """A row for each weight. `print` shows those that change, and why others stay."""

    rows: tuple[Compacted, ...]

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(r.bytes for r in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Of all weights as arrays."""
        return sum(r.dense_bytes for r in self.rows)

    def __str__(self) -> str:
        head = ("weight", "format", "shape", "zeros", "bytes", "of dense")
        cells = [
            (r.path, r.format, str(r.shape), f"{r.sparsity:.1%}", *_sizes(r))
            for r in self.rows
            if r.make is not None
        ]
        cells.append(("all weights", "", "", "", *_sizes(self)))
        said = [
            (
                r.path,
                f"{'stays as it is' if r.make is None else 'runs dense'}: {r.note}",
            )
            for r in self.rows
            if r.note
        ]
        return "\n".join([table(head, cells), *notes(said)])


def _sizes(of: Compacted | CompactReport) -> tuple[str, str]:
    return f"{of.bytes:,}", f"{of.bytes / max(1, of.dense_bytes):.1%}"


def compact_report(
    fn: Callable, params: PyTree, *args: Any, only: tree.Patterns | None = None
) -> CompactReport:
    """What `compact`, given the same arguments, does to each weight, in bytes.

    Raises:
        ValueError: a pattern matches no weight.
    """
    chosen = _choose(fn, params, args, only)
    ran_dense = {
        use.path: f"{use.primitive} at {use.source}"
        for use in lift_report(lift(fn), _compacted(params, chosen), *args)
        if not use.native
    }
    rows = [
        dataclasses.replace(c, note=c.note or ran_dense.get(path, ""))
        for path, c in chosen.items()
    ]
    return CompactReport(tuple(rows))


def _compacted(params: PyTree, chosen: dict[str, Compacted]) -> PyTree:
    def replace(keypath, x):
        make = chosen[tree.path_name(keypath)].make
        return x if make is None else make(jnp.asarray(x))

    return jax.tree_util.tree_map_with_path(replace, params, is_leaf=is_leaf)


def _choose(
    fn: Callable, params: PyTree, args: tuple, only: tree.Patterns | None
) -> dict[str, Compacted]:
    weights = tree.paths(params, is_leaf)
    named = set(weights if only is None else tree.match(only, weights))
    sites: dict[str, list[Site]] = {path: [] for path in weights}
    for site in trace(unlift(fn), shapes(params), *args).sites:
        sites[site.path].append(site)
    out = {}
    for path, x in weights.items():
        note = "" if path in named else "no pattern matches it"
        note = note or _why_not(x, sites[path])
        out[path] = _smallest(path, x, _lead(sites[path]), note)
    return out


def _why_not(x: Any, sites: list[Site]) -> str:
    if is_leaf(x):
        return "it is compressed already"
    if isinstance(x, jax.ShapeDtypeStruct):
        return "only its shape is known"
    if not tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return "it is no floating-point array"
    return "" if sites else "no product, convolution or look-up uses it"


def _lead(sites: list[Site]) -> int:
    """How many leading dims a scan may slice."""
    # The last batch dim of a look-up is that of its rows.
    sliced = [s.batch[:-1] if s.primitive == "gather" else s.batch for s in sites]
    return max((_prefix(dims) for dims in sliced), default=0)


def _prefix(dims: tuple[int, ...]) -> int:
    return next((i for i, d in enumerate(dims) if d != i), len(dims))


def _smallest(path: str, x: Any, lead: int, note: str) -> Compacted:
    array = tree.is_array(x) or is_leaf(x)
    shape = tuple(x.shape) if array else ()
    stored = tree.tree_bytes(x)
    name = type(x).__name__ if is_leaf(x) else str(getattr(x, "dtype", type(x)))
    size = math.prod(shape) * np.dtype(x.dtype).itemsize if array else 0
    if note:
        zeros = 0.0
        if tree.is_array(x) and not isinstance(x, jax.ShapeDtypeStruct):
            zeros = _zeros(np.asarray(x) != 0)
        return Compacted(path, shape, zeros, name, stored, size, note)
    nonzero = np.asarray(dense(x)) != 0
    best = Compacted(
        path, shape, _zeros(nonzero), name, stored, size, "it would be no smaller"
    )
    for format, n_bytes, make in _formats(nonzero, lead, np.dtype(x.dtype).itemsize):
        if n_bytes < best.bytes:
            best = dataclasses.replace(
                best, format=format, bytes=n_bytes, note="", make=make
            )
    return best


def _zeros(nonzero: np.ndarray) -> float:
    return 1 - float(nonzero.mean()) if nonzero.size else 0.0


def _formats(nonzero: np.ndarray, lead: int, itemsize: int):
    """(name, bytes, how to make it) of every format that fits, the best first."""
    size, shape = nonzero.size, nonzero.shape
    for axis in range(lead, len(shape)) if size else ():
        for m in NEIGHBOURS:
            if shape[axis] % m:
                continue
            groups = np.moveaxis(nonzero, axis, -1).reshape(-1, m)
            n = max(1, int(groups.sum(1).max()))
            bits = next(b for b in (1, 2, 4, 8) if m <= 2**b)
            kept = shape[axis] // m * n
            n_bytes = size // shape[axis] * (kept * itemsize + -(-kept * bits // 8))
            make = lambda w, n=n, m=m, axis=axis: nm_array(w, n, m, axis)
            yield f"{n}:{m}", n_bytes, make
    layers = math.prod(shape[:lead])
    for side in BLOCKS if size and len(shape) == lead + 2 else ():
        if shape[-1] % side == 0 and shape[-2] % side == 0:
            cells = block_cells(nonzero, (side, side), lead).any((-1, -2))
            room = max(1, int(cells.sum(-1).max()))
            n_bytes = layers * room * (side * side * itemsize + 4)
            make = lambda w, side=side: block_array(w, (side, side), lead)
            yield f"blocks of {side}x{side}", n_bytes, make
    if size and len(shape) > lead:
        each = nonzero.reshape(*shape[:lead], -1)
        room = max(1, int(each.sum(-1).max()))
        n_bytes = layers * (room * itemsize + -(-each.shape[-1] // 8))
        yield "bitmask", n_bytes, lambda w: bitmask_array(w, lead)
