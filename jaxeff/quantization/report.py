"""What quantization does to each weight: bits, error, and what stays as it is."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import lift, lift_report, notes, relative_error, table

from .quantize import apply, check_formats, choose, Formats, is_quantized


@dataclasses.dataclass(frozen=True)
class Row:
    """One array among the weights.

    Attributes:
        path: of the array.
        shape: of the array it stands for.
        format: name of its format, or of its dtype where it stays.
        bits: stored for each weight, scales included.
        error: root of the summed squared rounding errors over that of the summed
            squared weights. None: it stays, or only its shape is known.
        stays: whether it keeps the form it had.
        note: why it stays; or where it runs as a dense array after all.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits: float
    error: float | None
    stays: bool
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """A row for each array. `print` shows those that change, and why others stay."""

    rows: tuple[Row, ...]

    @property
    def bits(self) -> float:
        """Stored for each weight, over all arrays."""
        sizes = [_size(r) for r in self.rows]
        stored = sum(r.bits * n for r, n in zip(self.rows, sizes, strict=True))
        return stored / max(1, sum(sizes))

    def __str__(self) -> str:
        head = ("weight", "format", "shape", "bits per weight", "relative error")
        cells = [
            (r.path, r.format, str(r.shape), f"{r.bits:.2f}", _percent(r.error))
            for r in self.rows
            if not r.stays
        ]
        weights = f"{sum(map(_size, self.rows)):,}"
        cells.append(("all weights", "", weights, f"{self.bits:.2f}", ""))
        said = [
            (r.path, f"{'stays as it is' if r.stays else 'runs dense'}: {r.note}")
            for r in self.rows
            if r.note
        ]
        return "\n".join([table(head, cells), *notes(said)])


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _size(row: Row) -> int:
    return math.prod(row.shape)


def report(
    fn: Callable, params: PyTree, *args: Any, formats: Formats | None = None
) -> Report:
    """What `quantize`, given the same arguments, does to each weight.

    Raises:
        ValueError: as `quantize` does.
    """
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    new = apply(params, choices)
    before = jax.tree.leaves(params, is_leaf=is_quantized)
    after = jax.tree.leaves(new, is_leaf=is_quantized)
    dense = {
        e.path: f"{e.primitive} at {e.source}"
        for e in lift_report(lift(fn), new, *args)
        if not e.native
    }
    rows = []
    for c, w, q in zip(choices, before, after, strict=True):
        if not tree.is_array(w) and not is_quantized(w):
            continue
        name = q.format if is_quantized(q) else tree.dtype_name(q.dtype)
        rows.append(
            Row(
                path=c.path,
                shape=tuple(q.shape),
                format=name if c.format is None else c.format.name,
                bits=8 * tree.tree_bytes(q) / max(1, q.size),
                error=None if c.format is None else relative_error(w, q),
                stays=c.format is None,
                note=c.reason or dense.get(c.weight, ""),
            )
        )
    return Report(tuple(rows))
