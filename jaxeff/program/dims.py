"""The algebra of dims: which parts of which dims are one and the same.

A dim of an array is a `Dim`: an *atom*, a concatenation of dims (`cat`), or a
product of dims, major first (`prod`). Uniting two dims says that index i of the
one is index i of the other, and cuts both as finely as the other demands:
(heads * head_dim) united with (heads, head_dim) becomes a product, (d1 + d2)
united with (d1, d2) a concatenation. What cannot be cut that way is fixed, with
the reason; so an unusual program is refused, never corrupted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


class Conflict(ValueError):
    """A dim would have to keep its size and change it."""


@dataclasses.dataclass(eq=False, slots=True)
class Dim:
    """One dim, or a part of one. Compare and read it through `find`."""

    size: int
    kind: str = "atom"  # "atom", "cat" or "prod"
    parts: tuple["Dim", ...] = ()
    link: "Dim | None" = None  # the dim that it was united with
    reason: Callable[[], str] | None = None  # why its indices must all stay
    inexact: bool = False  # the reason: they can go, but not exactly
    new: int | None = None  # its size in the program to be run, if that is smaller


def find(d: Dim) -> Dim:
    """The dim that stands for `d` now."""
    while d.link is not None:
        if d.link.link is not None:
            d.link = d.link.link
        d = d.link
    return d


def atoms(d: Dim) -> Iterator[Dim]:
    """The atoms a dim is made of, in order; one may come more than once."""
    d = find(d)
    if d.kind == "atom":
        yield d
    for part in d.parts:
        yield from atoms(part)


def new_size(d: Dim) -> int:
    """The size of a dim in the program to be run."""
    d = find(d)
    if d.kind == "cat":
        return sum(map(new_size, d.parts))
    if d.kind == "prod":
        return math.prod(map(new_size, d.parts))
    return d.size if d.new is None else d.new


def kept(d: Dim, masks: Mapping[Dim, Bool[np.ndarray, " _"]]) -> Bool[np.ndarray, " _"]:
    """Which indices of a dim stay, given which indices of its atoms do."""
    d = find(d)
    if d.kind == "cat":
        return np.concatenate([kept(p, masks) for p in d.parts])
    if d.kind == "prod":
        out = np.ones(1, bool)
        for part in d.parts:
            out = np.logical_and.outer(out, kept(part, masks)).reshape(-1)
        return out
    return masks.get(d, np.ones(d.size, bool))


def occurrences(d: Dim) -> Iterator[tuple[Dim, Int[np.ndarray, " _"]]]:
    """Where a dim holds each of its atoms: the atom's index at each index of `d`.

    -1 stands where it is another part of a concatenation.
    """
    d = find(d)
    if d.kind == "atom":
        yield d, np.arange(d.size)
    shape = [p.size for p in d.parts]
    for i, part in enumerate(d.parts):
        for atom, index in occurrences(part):
            if d.kind == "cat":
                at = sum(shape[:i])
                out = np.full(d.size, -1)
                out[at : at + part.size] = index
            else:
                others = [j for j in range(len(shape)) if j != i]
                out = np.broadcast_to(np.expand_dims(index, others), shape).reshape(-1)
            yield atom, out


def product(parts: Sequence[Dim]) -> Dim:
    """The dim whose indices are those of `parts`, the last one fastest."""
    flat: list[Dim] = []
    for p in map(find, parts):
        flat += p.parts if p.kind == "prod" else [p] if p.size != 1 else []
    if len(flat) == 1:
        return flat[0]
    return Dim(math.prod(p.size for p in flat), "prod" if flat else "atom", tuple(flat))


def concat(parts: Sequence[Dim]) -> Dim:
    """The dim whose indices are those of `parts`, one after another."""
    flat: list[Dim] = []
    for p in map(find, parts):
        flat += p.parts if p.kind == "cat" else [p] if p.size != 0 else []
    if len(flat) == 1:
        return flat[0]
    return Dim(sum(p.size for p in flat), "cat" if flat else "atom", tuple(flat))


def fix(d: Dim, reason: Callable[[], str], inexact: bool = False) -> Dim:
    """Says that all indices of a dim must stay, and why.

    `inexact` says that they could go, if the function may change by it.
    """
    for atom in atoms(d):
        if atom.new is not None:
            raise Conflict(
                f"a dim of size {atom.size} was shrunk to {atom.new}, but must keep "
                f"its size: {reason()}."
            )
        if atom.reason is None or (atom.inexact and not inexact):
            atom.reason, atom.inexact = reason, inexact
    return d


def _become(d: Dim, kind: str, parts: tuple[Dim, ...]) -> None:
    """Turns an atom into a finer dim."""
    if d.new is not None:
        raise Conflict(
            f"a dim of size {d.size} was shrunk to {d.new}, but this function cuts it "
            f"into {' and '.join(str(p.size) for p in parts)}, and nothing says "
            "which part lost what."
        )
    d.kind, d.parts = kind, parts
    if d.reason is not None:
        for part in parts:
            part.reason, part.inexact = d.reason, d.inexact


def cut(d: Dim, at: int) -> tuple[Dim, Dim] | None:
    """The first `at` indices of a dim and the rest, as dims; None if it can't be."""
    d = find(d)
    if at in (0, d.size):
        return (Dim(0), d) if at == 0 else (d, Dim(0))
    if d.kind == "atom":
        _become(d, "cat", (Dim(at), Dim(d.size - at)))
        return d.parts[0], d.parts[1]
    if d.kind == "cat":
        for i, part in enumerate(d.parts):
            if at < part.size:
                halves = cut(part, at)
                if halves is None:
                    return None
                left, right = (*d.parts[:i], halves[0]), (halves[1], *d.parts[i + 1 :])
                return concat(left), concat(right)
            at -= part.size
    major, rest = d.parts[0], d.parts[1:]
    inner = math.prod(p.size for p in rest)
    halves = cut(major, at // inner) if at % inner == 0 else None
    if halves is None:
        return None
    return product([halves[0], *rest]), product([halves[1], *rest])


def factor(d: Dim, minor: int) -> tuple[Dim, Dim] | None:
    """A dim as (major, minor) with a minor part of that size; None if it can't be."""
    d = find(d)
    if d.size % minor:
        return None
    if minor in (1, d.size):
        return (d, Dim(1)) if minor == 1 else (Dim(1), d)
    if d.kind == "atom":
        _become(d, "prod", (Dim(d.size // minor), Dim(minor)))
        return d.parts[0], d.parts[1]
    if d.kind == "prod":
        tail: list[Dim] = []
        for i in reversed(range(len(d.parts))):
            part = d.parts[i]
            if minor % part.size == 0:
                tail, minor = [part, *tail], minor // part.size
                if minor == 1:
                    return product(d.parts[:i]), product(tail)
                continue
            halves = factor(part, minor)
            if halves is None:
                return None
            return product([*d.parts[:i], halves[0]]), product([halves[1], *tail])
        raise AssertionError("a product's parts multiply to its size")
    # A concatenation: every part must be cut alike, and share the minor part.
    halves = [_factor_run(run, minor) for run in _runs(d.parts, minor)]
    if any(h is None for h in halves):
        return None
    majors = [h[0] for h in halves if h is not None]
    minors = [h[1] for h in halves if h is not None]
    for m in minors[1:]:
        unite(minors[0], m, lambda: "parts of a concatenation are cut alike")
    return concat(majors), minors[0]


def _runs(parts: Sequence[Dim], minor: int) -> Iterator[list[Dim]]:
    """The shortest runs of parts that together are a multiple of `minor`."""
    run: list[Dim] = []
    for part in parts:
        run.append(part)
        if sum(p.size for p in run) % minor == 0:
            yield run
            run = []


def _factor_run(run: list[Dim], minor: int) -> tuple[Dim, Dim] | None:
    """`factor` of some parts of a concatenation: of one, or of one minor part cut."""
    if len(run) == 1:
        return factor(run[0], minor)
    whole = concat(run)
    return (Dim(1), whole) if whole.size == minor else None


# A dim that is one with itself, shifted, falls into one piece for each shift that it
# holds: 2047 of a text whose every token meets the next. Nobody removes from these.
DEEPEST = 32


def unite(a: Dim, b: Dim, reason: Callable[[], str], depth: int = 0) -> Dim:
    """Says that index i of `a` is index i of `b`, for every i.

    `reason` says why both are fixed, should their structures not fit together; or
    take more than `DEEPEST` cuts within cuts, of which `depth` are done.
    """
    a, b = find(a), find(b)
    if a is b:
        return a
    assert a.size == b.size, (a.size, b.size)
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        _unite_atom(a, b)
    elif depth > DEEPEST or not _align(a, b, reason, depth + 1):
        fix(a, reason)
        fix(b, reason)
        return b
    if a is not find(b):
        a.link = b
    return find(b)


def _unite_atom(a: Dim, b: Dim) -> None:
    """Hands on to `b` what is known of the atom `a`."""
    if a.new is not None:
        if b.kind == "atom" and b.new is None:
            b.new = a.new
            if b.reason is not None:
                fix(b, b.reason, b.inexact)
        else:
            # Even to the same size: nothing says that the same indices stayed.
            raise Conflict(
                f"a dim of size {a.size} was shrunk to {a.new} in one weight and, on "
                f"its own, to {new_size(b)} in another, but this function makes the "
                "two one."
            )
    if a.reason is not None:
        fix(b, a.reason, a.inexact)


def _align(a: Dim, b: Dim, reason: Callable[[], str], depth: int) -> bool:
    """Unites two compound dims part by part; False if their cuts do not fit."""
    if a.kind == "prod" and b.kind == "prod":
        return _align_products(a, b, reason, depth)
    if a.kind == "prod":
        a, b = b, a
    return _align_concats(a, b, reason, depth)


def _align_concats(a: Dim, b: Dim, reason: Callable[[], str], depth: int) -> bool:
    if b.kind == "prod":
        inner = math.prod(p.size for p in b.parts[1:])
        if any(part.size % inner for part in a.parts):
            # Cuts inside a factor, at the same places each time: (2, x + y) is
            # x + y + x + y.
            return _align_products(a, b, reason, depth)
    rest = b
    for part in a.parts:
        halves = cut(rest, part.size)
        if halves is None:
            return False
        unite(part, halves[0], reason, depth)
        rest = halves[1]
    return True


def _align_products(a: Dim, b: Dim, reason: Callable[[], str], depth: int) -> bool:
    rest_a, rest_b = a, b
    while rest_a.size > 1:
        minor = min(_last(rest_a).size, _last(rest_b).size)
        cut_a, cut_b = factor(rest_a, minor), factor(rest_b, minor)
        if cut_a is None or cut_b is None:
            return False
        unite(cut_a[1], cut_b[1], reason, depth)
        rest_a, rest_b = find(cut_a[0]), find(cut_b[0])
    return True


def _last(d: Dim) -> Dim:
    d = find(d)
    return _last(d.parts[-1]) if d.kind == "prod" else d


def expression(d: Dim, name: Callable[[Dim], Any]) -> Any:
    """A dim as plain data: `name(atom)`, `{"cat": [...]}` or `{"prod": [...]}`."""
    d = find(d)
    if d.kind == "atom":
        return name(d)
    return {d.kind: [expression(p, name) for p in d.parts]}


def from_expression(e: Any, atom: Callable[[Any], Dim]) -> Dim:
    """The dim that plain data describes; the reverse of `expression`."""
    if isinstance(e, dict):
        (kind, parts), *_ = e.items()
        make = {"cat": concat, "prod": product}[kind]
        return make([from_expression(p, atom) for p in parts])
    return atom(e)
