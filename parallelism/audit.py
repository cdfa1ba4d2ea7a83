"""What a compiled program sends: every collective, its axis, how much, how often.

    compiled = jax.jit(step).lower(state, batch).compile()
    print(audit(compiled, mesh))

The program is only read, so one compiled for chips that are not there tells what it
would send on them.

Source of the bytes that a device has to send at least: Chan et al. 2007, "Collective
communication: theory, practice, and experience", section 3, doi:10.1002/cpe.1206.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from jaxeff.program import table

from . import hlo

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What computes for long enough to hide an exchange behind it.
_COMPUTES = ("fusion", "dot", "convolution", "custom-call", "while", "call", "reduce")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the devices of each group.

    Attributes:
        kind: as XLA names it.
        axes: of the mesh, that a group spans; empty where it spans no whole axes.
        group: devices in each group; 2 of a permute, who sends and who gets.
        bytes: of the array on each device: what is reduced, scattered or sent, and
            for an all-gather what is gathered.
        count: how often it runs in one call of the program.
        certain: whether the count is exact; inside of a branch, or of a loop whose
            length is not known, it is not.
        overlaps: whether the devices compute between its start and its end.
        op_name: where it comes from, as JAX names it.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: int
    count: int
    certain: bool
    overlaps: bool
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that each device has to send at least, in one call of the program."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }
        return self.count * self.bytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Audit:
    """All collectives of a program, in the order in which they run."""

    collectives: tuple[Collective, ...]
    axes: tuple[str, ...] = ()  # of the mesh

    def of(
        self, kind: str | None = None, axes: str | Iterable[str] | None = None
    ) -> "Audit":
        """Only those of a kind, over exactly these axes.

        Args:
            kind: as XLA names it; None for all.
            axes: a name, or several in any order; None for all.

        Raises:
            ValueError: there is no such kind, or no such axis.
        """
        wanted = None if axes is None else {axes} if isinstance(axes, str) else {*axes}
        if kind is not None and kind not in KINDS:
            raise ValueError(
                f"there is no collective {kind!r}. Choose of: {', '.join(KINDS)}."
            )
        if unknown := sorted((wanted or set()) - {*self.axes}):
            raise ValueError(
                f"the mesh has no axis {unknown[0]!r}. Choose of: "
                f"{', '.join(self.axes)}."
            )
        return Audit(
            tuple(
                c
                for c in self.collectives
                if kind in (None, c.kind) and wanted in (None, {*c.axes})
            ),
            self.axes,
        )

    @property
    def count(self) -> int:
        """How many run in one call of the program."""
        return sum(c.count for c in self.collectives)

    @property
    def bytes(self) -> int:
        """Of the arrays, in one call of the program."""
        return sum(c.count * c.bytes for c in self.collectives)

    @property
    def sent(self) -> float:
        """Bytes that each device has to send at least, in one call of the program."""
        return sum(c.sent for c in self.collectives)

    def __str__(self) -> str:
        """A table: a row for each collective, and the sum."""
        if not self.collectives:
            return "no device sends anything to another."
        rows = [
            (
                c.kind,
                _axes(c.axes),
                str(c.group),
                f"{'' if c.certain else '? '}{c.count:,}",
                f"{c.bytes:,}",
                f"{c.sent:,.0f}",
                "yes" if c.overlaps else "no",
                _short(c.op_name),
            )
            for c in self.collectives
        ]
        rows.append(("all", "", "", f"{self.count:,}", "", f"{self.sent:,.0f}", "", ""))
        head = (
            "collective",
            "axes",
            "devices",
            "times",
            "bytes each",
            "sent by a device",
            "overlaps",
            "from",
        )
        said = table(head, rows)
        if not all(c.certain for c in self.collectives):
            said += "\n? in a branch, or in a loop of unknown length (counted once)"
        return said


def _axes(axes: tuple[str, ...]) -> str:
    return ", ".join(axes) or "?"


def _short(op_name: str, most: int = 48) -> str:
    return op_name if len(op_name) <= most else f"...{op_name[3 - most :]}"


@runtime_checkable
class HasText(Protocol):
    """What is read of `jax.stages.Compiled`."""

    def as_text(self) -> str | None:
        """The compiled program."""


def audit(compiled: HasText | Any, mesh: Mesh) -> Audit:
    """Every collective of a compiled program.

    Args:
        compiled: `jax.jit(fn).lower(*args).compile()`.
        mesh: that it was compiled for, to name the axes by.

    Raises:
        ValueError: it is not compiled; or the groups of a collective are written in a
            way that is not known here, or name devices that the mesh does not have.
    """
    if not hasattr(compiled, "as_text"):
        raise ValueError(
            f"a compiled program is audited, and this is a {type(compiled).__name__}. "
            "Give `jax.jit(fn).lower(*args).compile()`."
        )
    module = hlo.read(compiled.as_text() or "")
    return Audit(tuple(_collectives(module, mesh)), tuple(mesh.axis_names))


def _collectives(module: hlo.Module, mesh: Mesh) -> Iterator[Collective]:
    overlapping = _overlapping(module)
    # A TPU's asynchronous collective stands in the fusion that starts it, in those that
    # compute meanwhile, and in the one that waits for it, under the same number.
    chains = collections.Counter(filter(None, map(_chain, module.by_name.values())))
    started: set[str] = set()
    seen: set[str] = set()
    for i, inside, times, certain in module.walk():
        if i.name in overlapping:
            started |= {name for _, name in i.calls()}
        kind = i.opcode.removesuffix("-start")
        chain = _chain(i)
        if kind not in KINDS or chain in seen:
            continue
        if chain:
            seen.add(chain)
        held = sum(module.by_name[name].bytes for name in i.operands)
        if kind == "collective-permute":
            exchanged = hlo.pairs(i.attributes)
        else:
            exchanged = hlo.groups(i.attributes, mesh.size)
        group = exchanged.shape[1]
        if exchanged.size == 0 or (kind != "collective-permute" and group == 1):
            continue
        # On TPUs a reduce-scatter is a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and "reduce-scatter" in inside:
            kind = "reduce-scatter"
        yield Collective(
            kind=kind,
            axes=_axes_of(exchanged, mesh, whole=kind != "collective-permute"),
            group=group,
            bytes=held * (group if kind == "all-gather" else 1),
            count=times,
            certain=certain,
            overlaps=i.name in overlapping or inside in started or chains[chain] > 2,
            op_name=i.op_name,
        )


def _chain(i: hlo.Instruction) -> str:
    """The number of an asynchronous collective of a TPU, or nothing."""
    found = re.search(r'chain_id="(\d+)"', i.attributes)
    return found[1] if found else ""


def _axes_of(exchanged: np.ndarray, mesh: Mesh, whole: bool) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    if exchanged.max() >= mesh.size:
        raise ValueError(
            f"device {exchanged.max()} takes part in a collective, but the mesh has "
            f"{mesh.size} devices. Give the mesh that the program was compiled for."
        )
    at = np.stack(np.unravel_index(exchanged, mesh.devices.shape), -1)
    differ = (at != at[:, :1]).any((0, 1))
    axes = tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)
    span = np.prod([mesh.shape[name] for name in axes], dtype=int)
    return axes if not whole or span == exchanged.shape[1] else ()


def _overlapping(module: hlo.Module) -> set[str]:
    """The starts after which something is computed before they are waited for."""
    found = set()
    for body in module.computations.values():
        ends = {
            operand: at
            for at, i in enumerate(body)
            if i.opcode.endswith("-done")
            for operand in i.operands
        }
        for at, i in enumerate(body):
            between = body[at + 1 : ends.get(i.name, at)]
            if any(other.opcode in _COMPUTES for other in between):
                found.add(i.name)
    return found
