"""Couplings: the dims of weights that must change together.

Remove channel 3 of a kernel, and its bias, the batch norm after it and the next
kernel's input lose channel 3 as well: one coupling. `resize`
runs a function with indices removed from it. What cannot lose any is frozen, with
the reason and the source line.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Bool, Int

from .dims import atoms, Dim, find, fix, kept, occurrences
from .rule import Dims
from .solve import Solver
from .walk import needed
from .zero_rules import NOTHING
from .zeros import Zeros

_UNUSED = (
    "this function does not use {}: trace one that does, as a model uses its running "
    "statistics in evaluation"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Coupling:
    """Dims, or parts of dims, of weights that share their indices."""

    name: str
    size: int
    members: tuple[tuple[str, int], ...]  # (path of a weight, dim of it)
    reason: str | None  # why it is frozen; None: indices can be removed
    inexact: bool  # why it is frozen: the function would not stay exactly the same
    atom: Dim = dataclasses.field(repr=False)

    @property
    def frozen(self) -> bool:
        """Whether all its indices must stay."""
        return self.reason is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Couplings(Sequence[Coupling]):
    """All couplings of a program, in the order in which its weights meet them.

    Attributes:
        dims: for each weight, its dims.
    """

    all: tuple[Coupling, ...]
    dims: Mapping[str, Dims]

    def __getitem__(self, i):
        return self.all[i]

    def __len__(self) -> int:
        return len(self.all)

    @functools.cached_property
    def free(self) -> list[Coupling]:
        """Those from which indices can be removed."""
        return [c for c in self.all if not c.frozen]

    def describe(self, d: Dim) -> str:
        """A dim in words: its size and what it is made of, `64 c3 x c4*`.

        `x` joins factors, `+` parts one after another; `*` marks what is frozen.
        """
        frozen = {c.name for c in self.all if c.frozen}
        names = {a: n + "*" * (n in frozen) for a, n in self._names.items()}

        def spell(d: Dim) -> str:
            d = find(d)
            if d.kind == "atom":
                return names.get(d, str(d.size))
            inner = [spell(p) for p in d.parts]
            inner = [f"({s})" if " " in s else s for s in inner]
            return {"cat": " + ", "prod": " x "}[d.kind].join(inner)

        d = find(d)
        return "1" if d.size == 1 else f"{d.size} {spell(d)}"

    def masks(
        self, path: str, keep: Mapping[str, Bool[np.ndarray, " _"]]
    ) -> list[Bool[np.ndarray, " _"]]:
        """For each dim of a weight which indices stay, given that for couplings.

        Args:
            path: the weight.
            keep: for couplings, by name, which indices stay (True); the others
                keep all.
        """
        by_atom = {find(c.atom): keep[c.name] for c in self.all if c.name in keep}
        return [kept(d, by_atom) for d in self.dims[path]]

    def sums(
        self,
        values: Mapping[str, Array | np.ndarray],
        *,
        names: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """For each coupling, the sum of `values` over what each index removes.

        Of a weight that has the coupling on two dims (the recurrent kernel of a cell)
        the row and the column of an index are added, with their crossing twice.

        Args:
            values: for weights, by path, one number per element.
            names: only these couplings.
        """
        chosen = [c for c in self.all if names is None or c.name in names]
        totals = {c.name: np.zeros(c.size) for c in chosen}
        for path, array in values.items():
            for d in range(array.ndim):
                found = [f for f in self.occurrences(path, d) if f[0] in totals]
                if not found:
                    continue
                others = tuple(i for i in range(array.ndim) if i != d)
                line = np.asarray(array.sum(others), float)
                for name, index in found:
                    inside = index >= 0
                    np.add.at(totals[name], index[inside], line[inside])
        return totals

    def occurrences(
        self, path: str, dim: int
    ) -> list[tuple[str, Int[np.ndarray, " _"]]]:
        """The couplings that a dim of a weight is made of, by name.

        With each comes, for every index of the dim, which index of the coupling it
        belongs to; -1 where it belongs to another part. A coupling that a dim holds
        twice comes twice.
        """
        found = occurrences(self.dims[path][dim])
        return [(self._names[a], index) for a, index in found if a in self._names]

    @functools.cached_property
    def _names(self) -> dict[Dim, str]:
        return {find(c.atom): c.name for c in self.all}

    def __str__(self) -> str:
        lines = []
        for c in self.all:
            state = f"frozen: {c.reason}" if c.frozen else "free"
            lines.append(f"{c.name:>5}  size {c.size:<6} {state}")
            lines += [f"         {path}  dim {d}" for path, d in c.members]
        return "\n".join(lines)


def find_couplings(jaxpr: ClosedJaxpr, weights: Sequence[str | None]) -> Couplings:
    """The couplings of a traced program.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.
    """
    solver, ins = solved(jaxpr, weights)
    zeros = Zeros(solver)
    zeros.run(
        jaxpr,
        [
            NOTHING if path is None else zeros.weight(dims)
            for path, dims in zip(weights, ins, strict=True)
        ],
    )
    named = {p: d for p, d in zip(weights, ins, strict=True) if p is not None}
    return Couplings(tuple(couplings_of(weights, ins)), named)


def solved(
    jaxpr: ClosedJaxpr, weights: Sequence[str | None]
) -> tuple[Solver, list[Dims]]:
    """The dims of every array of a program, and those of its inputs.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.
    """
    solver = Solver()
    ins: list[Dims] = []
    used = needed(jaxpr)[1]
    for path, v, live in zip(weights, jaxpr.jaxpr.invars, used, strict=True):
        dims = tuple(Dim(n) for n in v.aval.shape)
        if path is None:
            dims = tuple(fix(d, lambda: "it is a dim of the inputs") for d in dims)
        elif not live:
            # Another function of the same weights may use it, in any way.
            reason = functools.partial(_UNUSED.format, path)
            dims = tuple(fix(d, reason) for d in dims)
        ins.append(dims)
    outs = solver.solve(jaxpr, ins)
    for dims in outs:
        for d in dims:
            fix(d, lambda: "it is a dim of the outputs")
    return solver, ins


def couplings_of(
    weights: Sequence[str | None], dims: Sequence[Dims]
) -> Iterator[Coupling]:
    """The atoms that weights are made of, with the weights, in order.

    Args:
        weights: for each input of a program the weight's path, or None for data.
        dims: of each.
    """
    members: dict[Dim, dict[tuple[str, int], None]] = {}
    for path, of in zip(weights, dims, strict=True):
        if path is None:
            continue
        for d, dim in enumerate(of):
            for atom in atoms(dim):
                if atom.size > 1:
                    members.setdefault(atom, {})[path, d] = None
    for i, (atom, where) in enumerate(members.items()):
        reason = _spelled(atom.reason)
        yield Coupling(f"c{i}", atom.size, tuple(where), reason, atom.inexact, atom)


def _spelled(reason: Callable[[], str] | Any) -> str | None:
    return None if reason is None else reason()
