"""What cutting a coupling over devices would split, and what they would have to add up.

Where an operation sums over a coupling that its operands have and its result has not,
each device has a part of the sum; the gradient of an operand without it, that meets one
with it, is such a sum too. Both are counted on the trace. What to cut, and over which
devices, `parallelism.tensor` chooses.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .couplings import Coupling, couplings_of, solved
from .dims import atoms, Dim, find, product
from .flops import equation_flops, MATMULS
from .interpret import is_inexact
from .rule import Dims
from .solve import Solver
from .walk import bodies, equations, Where

# How long the parts of a dim are, and whether each is cut.
Pieces = tuple[tuple[int, bool], ...]
_MOST_PIECES = 16

_last = lambda n: lambda eqn: range(eqn.invars[0].aval.ndim)[-n(eqn) :]
_one = lambda key: lambda eqn: (eqn.params[key],)
_wide = lambda eqn: [d for d, n in enumerate(eqn.params["window_dimensions"]) if n > 1]
# Which dims of its operands an operation goes along, so that none can do it alone; for
# those that join or cut, where the parts of different devices would have to move.
_SERIAL: dict[str, Callable[[JaxprEqn], Sequence[int]]] = {
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _one("axis")),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split(),
        _wide,
    ),
    "sort": _one("dimension"),
    "concatenate": _one("dimension"),
    "top_k": _last(lambda eqn: 1),
    "fft": _last(lambda eqn: len(eqn.params["fft_lengths"])),
    "rev": lambda eqn: eqn.params["dimensions"],
    "pad": lambda eqn: [
        d for d, size in enumerate(eqn.params["padding_config"]) if any(size)
    ],
}


@dataclasses.dataclass(frozen=True)
class Cut:
    """A coupling, and what cutting it into equal pieces would do.

    Attributes:
        coupling: what is cut.
        pieces: for each member, (path of a weight, dim of it), what is to be cut
            there, one after another: how long it is, and whether equal parts of it are
            equal parts of the coupling (if not, it has none of it). Empty where the
            dim holds the coupling in another way.
        meets: names of the couplings that some array has beside it.
        met: whether any operation has it.
        given: whether the data have it.
        serial: the primitive that goes along it, index by index, or nothing.
        flops: of the products that are split, of one run of the program.
        forward, backward: bytes of the arrays that are to be added up, when the program
            runs and when its gradient does; the sum of several gradients of one array
            counts once.
    """

    coupling: Coupling
    pieces: Mapping[tuple[str, int], Pieces]
    meets: frozenset[str]
    met: bool
    given: bool
    serial: str
    flops: int
    forward: int
    backward: int


@dataclasses.dataclass(frozen=True)
class Cuts:
    """All couplings of a program as cuts.

    Attributes:
        all: in the order in which the weights meet them.
        dims: for each weight, its dims.
    """

    all: tuple[Cut, ...]
    dims: Mapping[str, Dims]

    def touched(self, path: str, chosen: Sequence[Cut]) -> list[bool]:
        """For each dim of a weight, whether one of the chosen couplings is in it."""
        cut = {find(c.coupling.atom) for c in chosen}
        return [any(find(a) in cut for a in atoms(d)) for d in self.dims[path]]


def find_cuts(jaxpr: ClosedJaxpr, weights: Sequence[str | None]) -> Cuts:
    """What cutting each coupling of a program would do.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.
    """
    solver, ins = solved(jaxpr, weights)
    couplings = list(couplings_of(weights, ins))
    counted = _count(jaxpr, weights, solver, couplings)
    dims = {p: d for p, d in zip(weights, ins, strict=True) if p is not None}
    names = {find(c.atom): c.name for c in couplings}
    data = [dims for p, dims in zip(weights, ins, strict=True) if p is None]
    of_data = {find(a) for dims in data for d in dims for a in atoms(d)}
    found = []
    for c in couplings:
        given = find(c.atom) in of_data
        n = counted[find(c.atom)]
        pieces = {(path, d): _pieces(dims[path][d], c.atom) for path, d in c.members}
        meets = frozenset(names[a] for a in n.meets)
        found.append(
            Cut(
                c, pieces, meets, n.met, given, n.serial, n.flops, n.forward, n.backward
            )
        )
    return Cuts(tuple(found), dims)


@dataclasses.dataclass
class _Counted:
    """What splitting an atom does."""

    flops: int = 0
    forward: int = 0
    backward: int = 0
    meets: set[Dim] = dataclasses.field(default_factory=set)
    met: bool = False
    serial: str = ""  # what goes along it, index by index


def _count(
    jaxpr: ClosedJaxpr,
    weights: Sequence[str | None],
    solver: Solver,
    couplings: Sequence[Coupling],
) -> dict[Dim, _Counted]:
    counted = {find(c.atom): _Counted() for c in couplings}
    ours = lambda dims: {find(a) for d in dims for a in atoms(d)} & counted.keys()
    seen: set[tuple] = set()
    live = {where for where, _, _ in equations(jaxpr)}
    for here, eqn, times, trained in _visit(
        jaxpr, (), 1, [path is not None for path in weights]
    ):
        if here not in live:
            continue
        where = here[:-1]
        env = solver.dims[where]
        dims_of = lambda v, env=env: () if isinstance(v, Literal) else env[v]
        given = [ours(dims_of(v)) for v in eqn.invars]
        out = set().union(*(ours(dims_of(v)) for v in eqn.outvars))
        flops = equation_flops(eqn) if eqn.primitive.name in MATMULS else 0
        for atom in _along(eqn, [dims_of(v) for v in eqn.invars]) & counted.keys():
            counted[atom].serial = eqn.primitive.name
        for atom in set().union(out, *given):
            n = counted[atom]
            n.met = True
            n.flops += times * flops
            for dims in (*given, out):
                if atom in dims:
                    n.meets |= dims - {atom}
            if atom not in out:
                n.forward += times * sum(map(_bytes, eqn.outvars))
                continue
            if not any(atom in dims for dims in given):
                continue
            for v, dims, learns in zip(eqn.invars, given, trained, strict=True):
                # The gradients of one array from several places are added up first.
                if atom in dims or not learns or (where, v, atom) in seen:
                    continue
                seen.add((where, v, atom))
                n.backward += times * _bytes(v)
    return counted


def _along(eqn: JaxprEqn, ins: Sequence[Sequence[Dim]]) -> set[Dim]:
    """The atoms that an operation goes along, so that no device can do it alone."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        specs = (numbers.lhs_spec, numbers.rhs_spec)
        dims = [x[d] for x, spec in zip(ins, specs, strict=True) for d in spec[2:]]
    elif eqn.primitive.name in _SERIAL:
        dims = [
            x[d] for x in ins for d in _SERIAL[eqn.primitive.name](eqn) if d < len(x)
        ]
    else:
        return set()
    return {find(a) for d in dims for a in atoms(d)}


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


def _visit(
    jaxpr: ClosedJaxpr, where: Where, times: int, given: Sequence[bool]
) -> Iterator[tuple[Where, JaxprEqn, int, list[bool]]]:
    """Every equation that holds no program: its place, how often it runs, and which of
    its operands a gradient flows into.
    """
    learns: dict[Var, bool] = collections.defaultdict(bool)
    learns.update(zip(jaxpr.jaxpr.invars, given, strict=True))
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        floats = [
            not isinstance(v, Literal) and learns[v] and is_inexact(v)
            for v in eqn.invars
        ]
        inner = bodies(eqn, (*where, i))
        for body in inner:
            if body.kind == "shard_map":
                continue
            entering = [floats[j] for j in body.operands]
            if body.kind in ("scan", "while"):
                # What is carried learns as soon as anything does.
                stacked = set(body.stacked)
                entering = [
                    f or (j not in stacked and any(floats))
                    for j, f in enumerate(entering)
                ]
            yield from _visit(
                body.jaxpr, body.where, times * (body.times or 1), entering
            )
        if not inner:
            yield (*where, i), eqn, times, floats
        learns.update(dict.fromkeys(eqn.outvars, any(floats)))


def _pieces(d: Dim, atom: Dim) -> Pieces:
    """How long the parts of a dim are, and whether equal cuts of them cut the atom so.

    Empty where there are too many.
    """
    found = tuple(_runs(d, find(atom)))
    together = []
    for size, cut in found:
        if together and not cut and not together[-1][1]:
            size += together.pop()[0]
        together.append((size, cut))
    return tuple(together) if len(together) <= _MOST_PIECES else ()


def _runs(d: Dim, atom: Dim) -> Iterator[tuple[int, bool]]:
    d = find(d)
    if atom not in map(find, atoms(d)):
        yield d.size, False
    elif d is atom:
        yield d.size, True
    elif d.kind == "cat":
        for part in d.parts:
            yield from _runs(part, atom)
    else:
        first, rest = d.parts[0], product(d.parts[1:])
        if atom in map(find, atoms(first)):
            yield from ((n * rest.size, cut) for n, cut in _runs(first, atom))
        else:
            for _ in range(min(find(first).size, _MOST_PIECES + 1)):
                yield from _runs(rest, atom)
