"""Scalings: how weights can be multiplied without changing the function.

Multiply channel c of a kernel's outputs by s[c], its bias too, and divide what the
next kernel does with that channel: if only operations lie between that pass a factor
on (a product, a sum of equally scaled terms, relu), nothing changes. Which weights
go with which powers of s is the solution of linear equations, one for each place
where factors must agree or cancel; here they are set up and solved, for each coupling
of a program. SmoothQuant, AWQ, cross-layer equalisation and the folding of norms are
choices of s.

Sources: Nagel et al. 2019, arXiv:1906.04721, section 4.1 (what passes a factor on);
Xiao et al. 2022, arXiv:2211.10438, section 4 (through norms).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float, PyTree

from jaxeff import tree

from .couplings import Couplings, couplings_of, solved
from .dims import atoms, Dim, factor, find
from .rule import Dims
from .solve import Solver
from .walk import bodies, Body, needed, scan_counts, Where

# A power of s as a sum over unknowns: the powers of weights.
Power = Mapping[int, Fraction]
# For the atoms of an array, with which power of s it is multiplied along each.
Powers = dict[Dim, Power]


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


class Known:
    """What is known of an array: its powers, and its value if it is one number."""

    def __init__(self, powers: Powers, constant: float | None = None):
        self.powers, self.constant = powers, constant


def add(*several: Power, signs: Sequence[Fraction | int] | None = None) -> Power:
    """The sum of powers, each times a number."""
    total: dict[int, Fraction] = {}
    for p, sign in zip(several, signs or [1] * len(several), strict=True):
        for k, x in p.items():
            total[k] = total.get(k, Fraction(0)) + sign * x
    return {k: x for k, x in total.items() if x}


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


# Rules: from what is known of the operands to the powers of the results.


def _same(b, eqn, given, ins, outs):
    """f(s x) = s f(x), entry by entry, or entries only change place."""
    first = given[0]
    return [Known(dict(first.powers), first.constant) for _ in eqn.outvars]


def _power(of: Callable[[JaxprEqn, Any], float | None]) -> Callable:
    def rule(b, eqn, given, ins, outs):
        y = of(eqn, given)
        if y is None:
            for known in given:
                b.plain(known)
            return [{}]
        y = Fraction(y).limit_denominator(1000)
        return [{a: add(p, signs=[y]) for a, p in given[0].powers.items()}]

    return rule


def _times(sign: int) -> Callable:
    def rule(b, eqn, given, ins, outs):
        left, right = (k.powers for k in given)
        for together in zip(*(d for d in ins if d), strict=False):
            b.aligned(*together)
        return [
            {
                a: add(left.get(a, {}), right.get(a, {}), signs=[1, sign])
                for a in {*left, *right}
            }
        ]

    return rule


def _equal(b, eqn, given, ins, outs):
    return [b.equal(given, ins)]


def _chosen(b, eqn, given, ins, outs):
    b.plain(given[0])
    return [b.equal(given[1:], ins[1:])]


def _compared(b, eqn, given, ins, outs):
    b.equal(given, ins)
    return [{}]


def _apart(b: Balance, known: Known, dims: Sequence[Dim]) -> None:
    """Demands that an array is not multiplied along some of its dims."""
    for d in dims:
        for atom in atoms(d):
            b.zero(atom, known.powers.get(atom, {}))


def _without(known: Known, dims: Sequence[Dim]) -> Powers:
    gone = {a for d in dims for a in atoms(d)}
    return {a: p for a, p in known.powers.items() if a not in gone}


def _reduced(b, eqn, given, ins, outs):
    over = [ins[0][d] for d in eqn.params["axes"]]
    _apart(b, given[0], over)
    return [_without(given[0], over)]


def _along(b, eqn, given, ins, outs):
    _apart(b, given[0], [ins[0][eqn.params["axis"]]])
    return [dict(given[0].powers)]


def _window(b, eqn, given, ins, outs):
    sizes = eqn.params["window_dimensions"]
    _apart(b, given[0], [d for d, n in zip(ins[0], sizes, strict=True) if n > 1])
    return [dict(given[0].powers)]


def _dot(b, eqn, given, ins, outs):
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = (k.powers for k in given)
    out: Powers = {}
    for d, e in zip((*lc, *lb), (*rc, *rb), strict=True):
        b.aligned(ins[0][d], ins[1][e])
    for d in lc:
        for atom in atoms(ins[0][d]):
            b.zero(atom, add(left.get(atom, {}), right.get(atom, {})))
    for d in lb:
        for atom in atoms(ins[0][d]):
            out[atom] = add(left.get(atom, {}), right.get(atom, {}))
    for known, dims, used in ((left, ins[0], (*lc, *lb)), (right, ins[1], (*rc, *rb))):
        for d, dim in enumerate(dims):
            if d not in used:
                out.update({a: known[a] for a in atoms(dim) if a in known})
    return [out]


def _conv(b, eqn, given, ins, outs):
    numbers, (x, w) = eqn.params["dimension_numbers"], ins
    groups = eqn.params["feature_group_count"]
    w_out, w_in = (w[d] for d in numbers.rhs_spec[:2])
    left, right = (k.powers for k in given)
    parts = factor(w_out, w_out.size // groups)
    if parts is None or eqn.params["batch_group_count"] != 1:
        for known in given:
            b.plain(known)
        return [{}]
    channels = x[numbers.lhs_spec[1]]
    if groups == 1:
        b.aligned(channels, w_in)
    elif {*atoms(channels)} != {*atoms(parts[0]), *atoms(w_in)}:
        b.refused.update(a for d in (channels, w_in, w_out) for a in atoms(d))
    for atom in atoms(w_in):
        b.zero(atom, add(left.get(atom, {}), right.get(atom, {})))
    _apart(b, given[0], [x[d] for d in numbers.lhs_spec[2:]])
    _apart(b, given[1], [w[d] for d in numbers.rhs_spec[2:]])
    out: Powers = {}
    for atom in atoms(parts[0]):  # groups: of both
        out[atom] = add(left.get(atom, {}), right.get(atom, {}))
    for atom in atoms(parts[1]):
        out[atom] = right.get(atom, {})
    out.update({a: left[a] for a in atoms(x[numbers.lhs_spec[0]]) if a in left})
    return [out]


def _pad(b, eqn, given, ins, outs):
    if given[1].constant != 0:
        b.plain(given[0])
        return [{}]
    return [dict(given[0].powers)]


def _looked_up(b, eqn, given, ins, outs):
    b.plain(given[1])
    sizes = eqn.params["slice_sizes"]
    chosen = [d for d, n in zip(ins[0], sizes, strict=True) if n < d.size]
    _apart(b, given[0], chosen)
    return [_without(given[0], chosen)]


def _turned(b, eqn, given, ins, outs):
    _apart(b, given[0], [ins[0][d] for d in eqn.params["dimensions"]])
    return [dict(given[0].powers)]


def _joined(b, eqn, given, ins, outs):
    """Along the joined dim each keeps its atoms; along others they are alike."""
    axis = eqn.params["dimension"]
    out: Powers = {}
    mine = [{*atoms(dims[axis])} for dims in ins]
    for known, own in zip(given, mine, strict=True):
        for atom in own:
            power = known.powers.get(atom, {})
            if atom in out:  # one that is joined to itself
                b.zero(atom, add(out[atom], power, signs=[1, -1]))
            out[atom] = power
    rest = [
        Known({a: p for a, p in k.powers.items() if a not in own}, k.constant)
        for k, own in zip(given, mine, strict=True)
    ]
    others = [(*dims[:axis], *dims[axis + 1 :]) for dims in ins]
    return [{**out, **b.equal(rest, others)}]


def _updated(b, eqn, given, ins, outs):
    for known in given[2:]:
        b.plain(known)
    return [b.equal(given[:2], ins[:2])]


def _cut(b, eqn, given, ins, outs):
    """A part of a concatenation keeps its atoms; of a part of an atom nobody knows."""
    found = []
    for dims in outs:
        powers = dict(given[0].powers)
        for before, after in zip(ins[0], dims, strict=True):
            old, new = ({*atoms(d)} for d in (before, after))
            for atom in old - new:
                power = powers.pop(atom, {})
                if not new <= old:
                    b.zero(atom, power)
        found.append(powers)
    return found


def _each(b, eqn, given, ins, outs):
    return list(given)


RULES: dict[str, Callable] = {
    **dict.fromkeys(
        "neg abs real convert_element_type copy copy_p stop_gradient reduce_precision "
        "name reshape transpose squeeze broadcast_in_dim sharding_constraint".split(),
        _same,
    ),
    "mul": _times(1),
    "div": _times(-1),
    **dict.fromkeys("add add_any sub max min".split(), _equal),
    "select_n": _chosen,
    **dict.fromkeys("gt ge lt le eq ne".split(), _compared),
    "square": _power(lambda eqn, given: 2),
    "sqrt": _power(lambda eqn, given: 0.5),
    "rsqrt": _power(lambda eqn, given: -0.5),
    "integer_pow": _power(lambda eqn, given: eqn.params["y"]),
    "pow": _power(lambda eqn, given: given[1].constant),
    **dict.fromkeys("reduce_sum reduce_max reduce_min".split(), _reduced),
    **dict.fromkeys("cumsum cummax cummin".split(), _along),
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(), _window
    ),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "pad": _pad,
    "gather": _looked_up,
    "rev": _turned,
    "concatenate": _joined,
    **dict.fromkeys("split slice dynamic_slice".split(), _cut),
    "dynamic_update_slice": _updated,
    "optimization_barrier": _each,
}


def find_scalings(jaxpr: ClosedJaxpr, weights: Sequence[str | None]) -> list[Scaling]:
    """All scalings of a traced program that leave it as it is.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.

    Returns:
        A basis: every other scaling is a product of powers of these. Those with few
        weights come first.
    """
    solver, dims = solved(jaxpr, weights)
    balance = Balance(solver)
    used = needed(jaxpr)[1]
    each = zip(weights, dims, used, strict=True)
    ins = [balance.weight(p, d) if p and live else Known({}) for p, d, live in each]
    for known in balance.run(jaxpr, ins):
        balance.plain(known)
    found = []
    for c in couplings_of(weights, dims):
        atom = find(c.atom)
        if atom in balance.refused:
            continue
        mine = [i for i, (_, _, a) in enumerate(balance.unknown) if find(a) is atom]
        for vector in _null_space(balance.equations.get(atom, []), mine):
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


def _null_space(rows: list[Power], unknown: list[int]) -> list[dict[int, int]]:
    """Integer solutions of linear equations, one for each that can be chosen."""
    pivots: dict[int, Power] = {}
    for row in rows:
        for p, known in pivots.items():
            if p in row:
                row = add(row, known, signs=[1, -row[p]])
        if row:
            # The last unknown is expressed by those before it.
            p = max(row)
            row = add(row, signs=[1 / row[p]])
            for q in list(pivots):
                if p in pivots[q]:
                    pivots[q] = add(pivots[q], row, signs=[1, -pivots[q][p]])
            pivots[p] = row
    out = []
    for free in (i for i in unknown if i not in pivots):
        vector = {free: Fraction(1)}
        for p, row in pivots.items():
            if free in row:
                vector[p] = -row[free]
        scale = int(np.lcm.reduce([x.denominator for x in vector.values()]))
        out.append({i: int(x * scale) for i, x in sorted(vector.items())})
    return out
