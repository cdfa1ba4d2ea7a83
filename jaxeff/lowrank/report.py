"""What factoring does to each weight: rank, size, error, and what stays as it is."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import is_leaf, notes, relative_error, table

from .factored import Factored
from .factorize import choose, Ranks


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        path: of the weight.
        shape: of the array it stands for.
        rank: of its factors; None: it stays.
        density: numbers stored over the size of the array it stands for.
        error: root of the summed squared errors over that of the summed squared
            weights. None: it stays, or only its shape is known.
        note: why it stays.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    density: float
    error: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """A row for each weight. `print` shows those that change, and why others stay."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("weight", "shape", "rank", "size", "relative error")
        cells = [
            (
                r.path,
                str(r.shape),
                str(r.rank),
                f"{r.density:.0%}",
                "" if r.error is None else f"{r.error:.2%}",
            )
            for r in self.rows
            if r.rank is not None
        ]
        before = sum(math.prod(r.shape) for r in self.rows)
        after = sum(r.density * math.prod(r.shape) for r in self.rows)
        total = f"{after / max(1, before):.0%}"
        cells.append(("all weights", f"{before:,}", "", total, ""))
        stay = [(r.path, f"stays as it is: {r.note}") for r in self.rows if r.note]
        return "\n".join([table(head, cells), *notes(stay)])


def report(fn: Callable, params: PyTree, *args: Any, ranks: Ranks) -> Report:
    """What `factorize`, given the same arguments, does to each weight.

    Raises:
        ValueError: as `factorize` does.
    """
    weights = tree.paths(params, is_leaf)
    rows = []
    for path, new in choose(fn, params, args, ranks).items():
        w = weights[path]
        if not tree.is_array(w) and not is_leaf(w):
            continue
        factored = isinstance(new, Factored)
        rows.append(
            Row(
                path=path,
                shape=tuple(w.shape),
                rank=new.rank if factored else None,
                density=tree.tree_size(new if factored else w) / max(1, w.size),
                error=relative_error(w, new) if factored else None,
                note="" if factored else new,
            )
        )
    return Report(tuple(rows))
