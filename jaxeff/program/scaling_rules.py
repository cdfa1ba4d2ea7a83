"""How each primitive passes on what its operands are multiplied with.

A rule takes the `Balance` that collects equations, the equation of the program, what
is known of the operands, and the dims of operands and results; it returns the powers
of the results. A primitive without a rule demands that nothing is multiplied.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jax.extend.core import JaxprEqn

from .dims import atoms, Dim, factor
from .powers import add, Known, Powers


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


def _apart(b: Any, known: Known, dims: Sequence[Dim]) -> None:
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
