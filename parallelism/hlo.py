"""The text of a compiled program, read as far as collectives need it.

A module is a list of computations, each a list of instructions in the order in which
they run. Nothing is understood but names, types, operands, the computations an
instruction calls and how often.

Source: the XLA documentation, "Operation semantics", and the text that
`jax.stages.Compiled.as_text` gives.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
# `mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}`: a mesh's axes, how the devices
# lie in it, where that is not in order, and the axes that a group spans.
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]"
    r"(?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# What an operand is reduced with; it is no code that runs as such.
_REDUCES = (
    "all-reduce",
    "reduce-scatter",
    "reduce",
    "reduce-window",
    "scatter",
    "sort",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # as written: the value of a constant
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from, as JAX names it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(_bytes(*found) for found in _ARRAY.findall(self.type))

    def calls(self) -> Iterator[tuple[str, str]]:
        """The computations it runs: as what (`body`, `calls`), and the name."""
        if self.opcode.removesuffix("-start") in _REDUCES:
            return
        for what, names in _CALLED.findall(self.attributes):
            for name in re.findall(r"[\w.\-]+", names):
                yield what, name


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and where it starts."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction; names are unique in a module."""
        return {i.name: i for body in self.computations.values() for i in body}

    def walk(self) -> Iterator[tuple[Instruction, str, int, bool]]:
        """Every instruction that runs, with its computation, and how often it does.

        Yields:
            The instruction, the name of the computation that holds it, the times it
            runs in one call of the program, and whether that is certain: it is not
            inside of a branch, nor of a loop whose length is not known (which counts
            once).
        """

        def visit(name, times, certain):
            for i in self.computations[name]:
                yield i, name, times, certain
                for what, called in i.calls():
                    often = self.trips(i) if what in ("body", "condition") else 1
                    if what == "condition" and often is not None:
                        often += 1
                    always = not what.endswith(("computation", "computations"))
                    known = certain and always and often is not None
                    yield from visit(
                        called, times * (1 if often is None else often), known
                    )

        return visit(self.entry, 1, True)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None if the text does not tell.

        XLA notes it on some platforms. Elsewhere it is found where a counter goes from
        one constant to another by a third.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        parts = {
            w: n
            for w, n in re.findall(r"(condition|body)=%?([\w.\-]+)", loop.attributes)
        }
        test = self.computations[parts["condition"]][-1]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = self._copied(test.operands[0])
        at = re.search(r"index=(\d+)", counter.attributes)
        end = self._constant(test.operands[1])
        if counter.opcode != "get-tuple-element" or at is None or end is None:
            return None
        place = int(at[1])
        before = self.by_name[loop.operands[0]]
        after = self.computations[parts["body"]][-1]
        if before.opcode != "tuple" or after.opcode != "tuple":
            return None
        start = self._constant(before.operands[place])
        add = self._copied(after.operands[place])
        steps = [self._constant(name) for name in add.operands]
        step = next((n for n in steps if n is not None), None)
        if add.opcode != "add" or start is None or step is None or step < 1:
            return None
        return max(0, -((start - end) // step))

    def _copied(self, name: str) -> Instruction:
        """An instruction, or the one that it copies."""
        i = self.by_name[name]
        while i.opcode in ("copy", "bitcast") and i.operands:
            i = self.by_name[i.operands[0]]
        return i

    def _constant(self, name: str) -> int | None:
        """The integer that an instruction is, directly or as a copy."""
        i = self._copied(name)
        is_one = i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments)
        return int(i.arguments) if is_one else None


def read(text: str) -> Module:
    """A module out of its text.

    Raises:
        ValueError: it has no entry, so it is not the text of a compiled program.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = None, "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, body = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(body)
        elif found := _LINE.match(line):
            body.append(_instruction(found[1], found[2]))
    if entry is None:
        raise ValueError(
            "the text of a compiled program has an ENTRY, and this has none. Give "
            "`jax.jit(fn).lower(*args).compile()`."
        )
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, kind, rest[:opening], operands, arguments, rest[closing:])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has been closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}.")


def _bytes(dtype: str, dims: str) -> int:
    if dtype == "token":
        return 0
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    size = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
    return (size * bits + 7) // 8


def groups(attributes: str, devices: int) -> np.ndarray:
    """The devices that exchange with each other: a row for each group.

    Args:
        attributes: of a collective.
        devices: how many run the program.

    Raises:
        ValueError: the groups are written in a way that is not known here.
    """
    if found := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*found.groups())
    found = re.search(r"replica_groups=(\S.*?)(?:, [a-z_]+=|$)", attributes)
    text = found[1] if found else ""
    if text in ("", "{}"):
        return np.arange(devices)[None]
    if text.startswith("{{"):
        rows = re.findall(r"\{([\d,]+)\}", text)
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$", text):
        shape, of, order = (_ints(part) for part in iota.groups())
        return _iota(of, order).reshape(shape)
    raise ValueError(f"replica_groups={text} is written in a way that is not known.")


def _iota(shape: list[int], order: list[int]) -> np.ndarray:
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _mesh_groups(
    mesh: str, laid: str | None, order: str | None, named: str
) -> np.ndarray:
    # `'x':(2)4` is the part of axis x of size 4 after a first part of size 2.
    over = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    shape: list[int] = []
    inside: list[int] = []
    for name, size in ((n, int(s)) for n, s in re.findall(r"'(\w+)'=(\d+)", mesh)):
        parts = [(int(pre or 1), int(n or size)) for x, pre, n in over if x == name]
        for pre, n in parts[:1] or [(size, 1)]:
            inside.append(len(shape) + 1)
            shape += [pre, n, size // (pre * n)]
    ids = _iota(_ints(laid) or shape, _ints(order)).reshape(shape)
    outside = [i for i in range(len(shape)) if i not in inside]
    return ids.transpose(outside + inside).reshape(
        -1, int(np.prod([shape[i] for i in inside]))
    )


def pairs(attributes: str) -> np.ndarray:
    """Who sends to another in a `collective-permute`: rows of (source, target)."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    rows = re.findall(r"(\d+),(\d+)", found[1] if found else "")
    return np.array([r for r in rows if r[0] != r[1]], int).reshape(-1, 2)


def _ints(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []
