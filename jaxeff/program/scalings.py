"""Scalings: how weights can be multiplied without changing the function.

Multiply channel c of a kernel's outputs by s[c], its bias too, and divide what the
next kernel does with that channel: if only operations lie between that pass a factor
on (a product, a sum of equally scaled terms, relu), nothing changes. Which weights
go with which powers of s is the solution of linear equations, one for each place
where factors must agree or cancel; here they are set up and solved, for each coupling
of a program. SmoothQuant, AWQ, cross-layer equalisation and the folding of norms are
choices of s. The rules of the primitives are in `scaling_rules.py`.

Sources: Nagel et al. 2019, arXiv:1906.04721, section 4.1 (what passes a factor on);
Xiao et al. 2022, arXiv:2211.10438, section 4 (through norms).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float, PyTree

from jaxeff import tree

from .couplings import Couplings, couplings_of, solved
from .dims import atoms, Dim, find
from .leaf import is_real
from .powers import add, Known, null_space, Power, Powers
from .rule import Dims
from .scaling_rules import RULES
from .solve import Solver
from .walk import bodies, Body, needed, scan_counts, Where


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Multiplying weights by powers of one positive vector changes nothing.

    Attributes:
        coupling: name of the coupling that the vector runs along.
        size: of it.
        powers: for (path of a weight, dim of it), the power.
    """

    coupling: str
    size: int
    powers: Mapping[tuple[str, int], int]


class Balance:
    """Carries powers through a solved program, and collects the equations."""

    def __init__(self, solver: Solver):
        self.solver = solver
        self.unknown: list[tuple[str, int, Dim]] = []
        self.equations: dict[Dim, list[Power]] = {}
        self.refused: set[Dim] = set()

    def weight(self, path: str, dims: Dims) -> Known:
        """A weight has a power of its own along each of its atoms."""
        powers: Powers = {}
        for d, dim in enumerate(dims):
            for atom in atoms(dim):
                if atom in powers:
                    self.refused.add(atom)  # twice in one array
                elif atom.size > 1:
                    self.unknown.append((path, d, atom))
                    powers[atom] = {len(self.unknown) - 1: Fraction(1)}
        return Known(powers)

    def zero(self, atom: Dim, power: Power) -> None:
        """Demands that a power is 0."""
        if power:
            self.equations.setdefault(find(atom), []).append(power)

    def plain(self, known: Known) -> None:
        """Demands that an array is not multiplied at all."""
        for atom, power in known.powers.items():
            self.zero(atom, power)

    def aligned(self, *dims: Dim) -> None:
        """Refuses what several dims are made of, where that is not the same."""
        made = {tuple(a for a in atoms(d) if a.size > 1) for d in dims if d.size > 1}
        if len(made) > 1:
            self.refused.update(a for several in made for a in several)

    def equal(self, given: Sequence[Known], dims: Sequence[Dims]) -> Powers:
        """Demands that aligned arrays are multiplied alike; 0 is, by anything."""
        for together in zip(*(d for d in dims if d), strict=False):
            self.aligned(*together)
        there = [k for k in given if k.constant != 0]
        out: Powers = {}
        for atom in {a for k in there for a in k.powers}:
            all = [k.powers.get(atom, {}) for k in there]
            for power in all[1:]:
                self.zero(atom, add(all[0], power, signs=[1, -1]))
            out[atom] = all[0]
        return {a: p for a, p in out.items() if p}

    def run(
        self, jaxpr: ClosedJaxpr, ins: Sequence[Known], where: Where = ()
    ) -> list[Known]:
        """From the powers of the inputs to those of the outputs."""
        env: dict[Var, Known] = {v: Known({}) for v in jaxpr.jaxpr.constvars}
        env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))
        read = lambda v: _literal(v) if isinstance(v, Literal) else env[v]
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            given = [read(v) for v in eqn.invars]
            inner = bodies(eqn, (*where, i))
            if inner:
                outs = _ENTER[inner[0].kind](self, eqn, given, inner)
            else:
                outs = self._equation(eqn, given, where)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, given: list[Known], where: Where) -> list[Known]:
        ins = [self.solver.read(v, where) for v in eqn.invars]
        outs = [self.solver.read(v, where) for v in eqn.outvars]
        for dims in (*ins, *outs):
            seen: set[Dim] = set()
            for atom in (a for d in dims for a in atoms(d)):
                if atom in seen and atom.size > 1:
                    self.refused.add(atom)
                seen.add(atom)
        rule = RULES.get(eqn.primitive.name)
        if rule is None:
            for known in given:
                self.plain(known)
            return [Known({}) for _ in eqn.outvars]
        found = rule(self, eqn, given, ins, outs)
        found = [f if isinstance(f, Known) else Known(f) for f in found]
        for known, dims in zip(found, outs, strict=True):
            there = {a for d in dims for a in atoms(d)}
            for atom in [a for a in known.powers if a not in there]:
                self.zero(atom, known.powers.pop(atom))
        return found

    # Bodies.

    def _call(self, eqn: JaxprEqn, given: list[Known], inner: list[Body]) -> list:
        return self.run(inner[0].jaxpr, given, inner[0].where)

    def _scan(self, eqn: JaxprEqn, given: list[Known], inner: list[Body]) -> list:
        n, m = scan_counts(eqn)
        body = inner[0]
        entering = list(given)
        for j in body.stacked:  # what each turn sees has no factor along the turns
            dims = self.solver.read(body.jaxpr.jaxpr.invars[j], body.where)
            there = {a for d in dims for a in atoms(d)}
            for atom, power in given[j].powers.items():
                if atom not in there:
                    self.zero(atom, power)
            inside = {a: p for a, p in given[j].powers.items() if a in there}
            entering[j] = Known(inside, given[j].constant)
        outs = self.run(body.jaxpr, entering, body.where)
        for before, after in zip(given[n : n + m], outs[:m], strict=True):
            self.equal([before, after], [])  # their dims were united
        return outs

    def _refuse(self, eqn: JaxprEqn, given: list[Known], inner: list[Body]) -> list:
        for known in given:
            self.plain(known)
        return [Known({}) for _ in eqn.outvars]


_ENTER: dict[str, Callable] = {
    "call": Balance._call,
    "scan": Balance._scan,
    "while": Balance._refuse,
    "cond": Balance._refuse,
    "shard_map": Balance._refuse,
}


def _literal(v: Literal) -> Known:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    if v.aval.size != 1 or not any(jnp.issubdtype(v.aval.dtype, t) for t in real):
        return Known({})
    return Known({}, float(np.asarray(v.val).reshape(())))


def find_scalings(
    jaxpr: ClosedJaxpr, weights: Sequence[str | None], fixed: Collection[str] = ()
) -> list[Scaling]:
    """All scalings of a traced program that leave it as it is.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.
        fixed: paths of weights that are in none; nor are those of integers or of 8
            bits, which would round to others.

    Returns:
        A basis: every other scaling is a product of powers of these. Those with few
        weights come first.
    """
    solver, dims = solved(jaxpr, weights)
    balance = Balance(solver)
    used = needed(jaxpr)[1]
    free = [
        live and path is not None and path not in fixed and is_real(v.aval.dtype)
        for path, live, v in zip(weights, used, jaxpr.jaxpr.invars, strict=True)
    ]
    each = zip(weights, dims, free, strict=True)
    ins = [balance.weight(p, d) if p and yes else Known({}) for p, d, yes in each]
    for known in balance.run(jaxpr, ins):
        balance.plain(known)
    found = []
    for c in couplings_of(weights, dims):
        atom = find(c.atom)
        if atom in balance.refused:
            continue
        mine = [i for i, (_, _, a) in enumerate(balance.unknown) if find(a) is atom]
        for vector in null_space(balance.equations.get(atom, []), mine):
            powers = {balance.unknown[i][:2]: e for i, e in vector.items()}
            found.append(Scaling(c.name, c.size, powers))
    return sorted(found, key=lambda s: len(s.powers))


def scale_weights(
    params: PyTree,
    couplings: Couplings,
    scaling: Scaling,
    by: Float[Array, " size"],
) -> PyTree:
    """The weights multiplied by the powers of a vector that a scaling says.

    Args:
        params: the weights, dense.
        couplings: of the program that the scaling is of.
        scaling: which weights, and powers.
        by: positive, of the coupling's size.
    """
    factors: dict[str, list[tuple[int, Array]]] = {}
    for (path, d), power in scaling.powers.items():
        for name, index in couplings.occurrences(path, d):
            if name == scaling.coupling:
                each = jnp.where(index >= 0, by[np.maximum(index, 0)] ** power, 1.0)
                factors.setdefault(path, []).append((d, each))

    def scaled(keypath: tuple, w: Any) -> Any:
        new = w
        for d, each in factors.get(tree.path_name(keypath), ()):
            shape = [len(each) if i == d else 1 for i in range(w.ndim)]
            new = (new * each.reshape(shape)).astype(w.dtype)
        return new

    return jax.tree_util.tree_map_with_path(scaled, params)
