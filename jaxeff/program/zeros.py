"""Where removing an index is exact, because its entries are known to be zero.

Removing indices from a coupling equals zeroing them in every weight, as long
as nobody looks at what an operation made of the zeros. Whoever multiplies with
a weight along the dim never does: its rows are gone as well. A sum along it
does, and so does the product of two activations; there the entries must be
known to be zero still. Weights are zero where they are removed; `relu`, `tanh`
and products keep a zero; `exp`, `cos`, `x - mean(x)` and an added constant lose
it. A dim that is summed where the zero was lost is fixed, with that reason.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.lax import GatherScatterMode

from .dims import atoms, Dim, factor
from .rules import because, Dims
from .solve import Solver
from .source import inside
from .walk import bodies, Body, scan_counts, Where


class Zero(NamedTuple):
    """What is known of an array in the masked program."""

    atoms: frozenset[Dim] = frozenset()  # zero at the removed indices of these
    constant: float | None = None  # every entry is this number

    def has(self, atom: Dim) -> bool:
        """Whether entries at removed indices of an atom are zero."""
        return self.constant == 0 or atom in self.atoms


NOTHING = Zero()


def _atoms(*arrays: Dims) -> frozenset[Dim]:
    """The atoms of some arrays that may still lose indices."""
    return frozenset(
        a for dims in arrays for d in dims for a in atoms(d) if a.reason is None
    )


class Zeros:
    """Carries the knowledge of zeros through a solved program."""

    def __init__(self, solver: Solver):
        self.solver = solver

    def weight(self, dims: Dims) -> Zero:
        """A weight is zero wherever it is removed."""
        return Zero(_atoms(dims))

    def run(
        self, jaxpr: ClosedJaxpr, ins: Sequence[Zero], where: Where = ()
    ) -> list[Zero]:
        """From what is known of the inputs to what is known of the outputs."""
        env: dict[Var, Zero] = dict.fromkeys(jaxpr.jaxpr.constvars, NOTHING)
        env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))
        read = lambda v: _literal(v) if isinstance(v, Literal) else env[v]
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            given = [read(v) for v in eqn.invars]
            inner = bodies(eqn, (*where, i))
            if inner:
                with inside(eqn):
                    outs = _ENTER[inner[0].kind](self, eqn, given, inner)
            else:
                outs = self._equation(eqn, given, where)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, given: list[Zero], where: Where) -> list[Zero]:
        name = eqn.primitive.name
        if all(z.constant is not None for z in given) and given:
            folded = _fold(name, eqn, [z.constant for z in given])
            if folded is not None:
                return [Zero(constant=folded)]
        rule = _RULES.get(name)
        if rule is None:
            return [NOTHING] * len(eqn.outvars)
        ins = [self.solver.read(v, where) for v in eqn.invars]
        outs = [self.solver.read(v, where) for v in eqn.outvars]
        known = rule(self, eqn, given, ins, outs)
        # An atom that left the array is forgotten: it may come back by broadcast.
        return [
            Zero(z.atoms & _atoms(dims), z.constant)
            for z, dims in zip(known, outs, strict=True)
        ]

    def lost(self, eqn: JaxprEqn, dims: Dims, zero: Zero, what: str) -> None:
        """Fixes the atoms of summed dims that are not known to be zero."""
        for atom in _atoms(dims):
            if not zero.has(atom):
                self.solver.exact(atom, because(eqn, what))

    # Bodies.

    def _call(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        return self.run(inner[0].jaxpr, given, inner[0].where)

    def _scan(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        n, m = scan_counts(eqn)
        body = inner[0]

        def turn(carry):
            return self.run(
                body.jaxpr, [*given[:n], *carry, *given[n + m :]], body.where
            )

        carry, outs = _fixed_point(turn, given[n : n + m])
        return [*carry, *outs[m:]]

    def _while(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        test, body = inner
        n_test, m = len(test.operands), len(eqn.outvars)
        turn = lambda carry: self.run(
            body.jaxpr, [*(given[j] for j in body.operands[:-m]), *carry], body.where
        )
        carry, _ = _fixed_point(turn, given[len(given) - m :])
        consts = [given[j] for j in test.operands[: n_test - m]]
        self.run(test.jaxpr, [*consts, *carry], test.where)
        return carry

    def _cond(self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]) -> list[Zero]:
        several = [
            self.run(b.jaxpr, [given[j] for j in b.operands], b.where) for b in inner
        ]
        return [_both(*zeros) for zeros in zip(*several, strict=True)]

    def _shard_map(
        self, eqn: JaxprEqn, given: list[Zero], inner: list[Body]
    ) -> list[Zero]:
        return [NOTHING] * len(eqn.outvars)


_ENTER = {
    "call": Zeros._call,
    "scan": Zeros._scan,
    "while": Zeros._while,
    "cond": Zeros._cond,
    "shard_map": Zeros._shard_map,
}


def _fixed_point(turn: Callable, carry: list[Zero]) -> tuple[list[Zero], list[Zero]]:
    """A loop's carry as known in every turn: knowledge only shrinks, so it ends."""
    while True:
        outs = turn(carry)
        after = [_both(a, b) for a, b in zip(carry, outs[: len(carry)], strict=True)]
        if after == carry:
            return carry, outs
        carry = after


def _both(*zeros: Zero) -> Zero:
    """What is known of an array that is one of several."""
    same = all(z.constant == zeros[0].constant for z in zeros)
    known = [z for z in zeros if z.constant != 0]
    shared = frozenset.intersection(*(z.atoms for z in known)) if known else frozenset()
    return Zero(shared, zeros[0].constant if same else None)


def _literal(v: Literal) -> Zero:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    if v.aval.size != 1 or not any(jnp.issubdtype(v.aval.dtype, t) for t in real):
        return NOTHING
    return Zero(constant=float(np.asarray(v.val).reshape(())))


def _fold(name: str, eqn: JaxprEqn, values: list[Any]) -> float | None:
    """The value of an operation on constants, where it is needed."""
    if name in (
        "broadcast_in_dim",
        "convert_element_type",
        "reshape",
        "copy",
        "squeeze",
    ):
        return values[0]
    if name == "neg":
        return -values[0]
    return None


# The rules. `ins` and `outs` are the dims of operands and results.


def _keep(zeros, eqn, given, ins, outs) -> list[Zero]:
    """f(0) = 0, entry by entry, or entries only change place."""
    return [Zero(given[0].atoms, given[0].constant if given[0].constant == 0 else None)]


def _per_dim(given, ins, out: Dims, quantifier: Callable) -> frozenset[Dim]:
    """Atoms that are zero in the result, by all or any of the aligned operands.

    An operand whose dim has size 1 is repeated along it, and so is not zero at
    a removed index. An atom in two dims of the result must be zero along both.
    """
    known: dict[Dim, bool] = {}
    for d, dim in enumerate(out):
        for atom in _atoms((dim,)):
            by = [
                z.constant == 0
                or (len(dims) > d and dims[d].size == dim.size and atom in z.atoms)
                for z, dims in zip(given, ins, strict=True)
            ]
            known[atom] = known.get(atom, True) and quantifier(by)
    return frozenset(a for a, zero in known.items() if zero)


def _any(zeros, eqn, given, ins, outs) -> list[Zero]:
    """A product is zero where either factor is."""
    constant = 0.0 if any(z.constant == 0 for z in given) else None
    return [Zero(_per_dim(given, ins, outs[0], any), constant)]


def _all(zeros, eqn, given, ins, outs) -> list[Zero]:
    """A sum is zero where all terms are."""
    constant = 0.0 if all(z.constant == 0 for z in given) else None
    return [Zero(_per_dim(given, ins, outs[0], all), constant)]


def _extremum(sign: int) -> Callable:
    def rule(zeros, eqn, given, ins, outs) -> list[Zero]:
        """max(x, c) keeps the zeros of x for c <= 0, min(x, c) for c >= 0."""
        a, b = given
        for x, c in ((0, b), (1, a)):
            if c.constant is not None and sign * c.constant <= 0:
                return _only(x, given, ins, outs)
        return _all(zeros, eqn, given, ins, outs)

    return rule


def _only(i: int, given, ins, outs) -> list[Zero]:
    """A result is zero where one of the operands is, whatever the others are."""
    constant = 0.0 if given[i].constant == 0 else None
    return [Zero(_per_dim(given[i : i + 1], ins[i : i + 1], outs[0], all), constant)]


def _clamp(zeros, eqn, given, ins, outs) -> list[Zero]:
    low, _, high = (z.constant for z in given)
    known = low is not None and high is not None and low <= 0 <= high
    return _only(1, given, ins, outs) if known else [NOTHING]


def _select(zeros, eqn, given, ins, outs) -> list[Zero]:
    return _all(zeros, eqn, given[1:], ins[1:], outs)


def _power(zeros, eqn, given, ins, outs) -> list[Zero]:
    y = eqn.params.get("y", given[1].constant if len(given) > 1 else None)
    known = y is not None and y > 0
    return _only(0, given, ins, outs) if known else [NOTHING]


def _divide(zeros, eqn, given, ins, outs) -> list[Zero]:
    if given[1].constant == 0:
        return [NOTHING]
    known = _only(0, given, ins, outs)[0]
    return [Zero(known.atoms - given[1].atoms, known.constant)]


def _sum(zeros, eqn, given, ins, outs) -> list[Zero]:
    axes = eqn.params["axes"]
    summed = tuple(ins[0][d] for d in axes)
    zeros.lost(eqn, summed, given[0], "a sum over it sees entries that are not zero")
    return _keep(zeros, eqn, given, ins, outs)


def _either(given: list[Zero]) -> Zero:
    """What is zero in one of two factors that a product pairs along a dim."""
    constant = 0.0 if any(z.constant == 0 for z in given) else None
    return Zero(frozenset().union(*(z.atoms for z in given)), constant)


def _product(zeros, eqn, given, summed, sides, outs) -> list[Zero]:
    """A product summed over `summed`, whose output dims come from one side each."""
    either = _either(given)
    zeros.lost(
        eqn, summed, either, "a product summed over it sees entries that are not zero"
    )
    out = {}
    for dims, zero in sides:
        for atom in _atoms(dims):
            out[atom] = out.get(atom, True) and zero.has(atom)
    return [Zero(frozenset(a for a, known in out.items() if known))]


def _dot(zeros, eqn, given, ins, outs) -> list[Zero]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = ins
    either = _either(given)
    sides = [
        (tuple(left[d] for d in lb), either),
        (tuple(x for d, x in enumerate(left) if d not in (*lc, *lb)), given[0]),
        (tuple(x for d, x in enumerate(right) if d not in (*rc, *rb)), given[1]),
    ]
    summed = tuple(left[d] for d in lc)
    return _product(zeros, eqn, given, summed, sides, outs)


def _ragged(zeros, eqn, given, ins, outs) -> list[Zero]:
    (lc, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    summed = tuple(ins[0][d] for d in lc)
    sides = [
        (tuple(x for d, x in enumerate(ins[0]) if d not in lc), given[0]),
        (outs[0][-1:], given[1]),
    ]
    return _product(zeros, eqn, given[:2], summed, sides, outs)


def _conv(zeros, eqn, given, ins, outs) -> list[Zero]:
    numbers, (x, w) = eqn.params["dimension_numbers"], ins
    groups = eqn.params["feature_group_count"]
    w_out, w_in = (w[d] for d in numbers.rhs_spec[:2])
    batch = ((x[numbers.lhs_spec[0]],), given[0])
    # A group is not summed over: who is removed is removed on both sides.
    parts = factor(w_out, w_out.size // groups)
    if parts is None:  # then all these dims are fixed
        return [NOTHING]
    sides = [batch, (parts[:1], _either(given)), (parts[1:], given[1])]
    return _product(zeros, eqn, given, (w_in,), sides, outs)


def _joined(zeros, eqn, given, ins, outs) -> list[Zero]:
    """Several arrays side by side: an atom is zero if it is in each it occurs in."""
    out = {}
    for dims, zero in zip(ins, given, strict=True):
        for atom in _atoms(dims):
            out[atom] = out.get(atom, True) and zero.has(atom)
    return [Zero(frozenset(a for a, known in out.items() if known))]


def _pad(zeros, eqn, given, ins, outs) -> list[Zero]:
    x, value = given
    if value.constant != 0:
        return [NOTHING]
    # What was added is zero everywhere; what was there is as it was.
    inside = _atoms(ins[0])
    known = frozenset(a for a in _atoms(outs[0]) if a not in inside or x.has(a))
    return [Zero(known)]


def _broadcast(zeros, eqn, given, ins, outs) -> list[Zero]:
    """Along a dim that it is repeated along, an array is not zero anywhere."""
    dims = eqn.params["broadcast_dimensions"]
    old = {d: x for d, x in zip(dims, ins[0], strict=True)}
    repeated = tuple(
        x for d, x in enumerate(outs[0]) if d not in old or old[d].size != x.size
    )
    return [Zero(given[0].atoms - _atoms(repeated))]


def _looked_up(zeros, eqn, given, ins, outs) -> list[Zero]:
    fill, dtype = eqn.params["fill_value"], eqn.outvars[0].aval.dtype
    if eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP:
        if fill is None:  # so JAX says NaN, or an extreme integer
            fill = np.nan if np.issubdtype(dtype, np.inexact) else 1
        if not (fill == 0 or np.isnan(fill)):  # NaN no sum hides
            return [NOTHING]
    return [Zero(given[0].atoms - _atoms(ins[1]))]


def _window(zeros, eqn, given, ins, outs) -> list[Zero]:
    """Along other dims; but a window that sees padding alone is not zero."""
    p = eqn.params
    seen = set(p["base_dilation"]) <= {1} and all(
        max(pad) <= (n - 1) * step
        for pad, n, step in zip(
            p["padding"], p["window_dimensions"], p["window_dilation"], strict=True
        )
    )
    return _keep(zeros, eqn, given, ins, outs) if seen else [NOTHING]


def _updated(zeros, eqn, given, ins, outs) -> list[Zero]:
    return _joined(zeros, eqn, given[:2], ins[:2], outs)


def _first_each(zeros, eqn, given, ins, outs) -> list[Zero]:
    return list(given[: len(eqn.outvars)])


def _each_part(zeros, eqn, given, ins, outs) -> list[Zero]:
    return [given[0]] * len(eqn.outvars)


_RULES: dict[str, Callable] = {
    **dict.fromkeys(
        "neg sin tan tanh sinh asin asinh atan atanh expm1 log1p sqrt cbrt abs sign "
        "floor ceil round square erf erf_inv real imag conj convert_element_type copy "
        "copy_p stop_gradient reduce_precision name reshape transpose squeeze "
        "slice dynamic_slice rev reduce_max reduce_min reduce_or "
        "reduce_window_sum".split(),
        _keep,
    ),
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "broadcast_in_dim": _broadcast,
    "gather": _looked_up,
    "mul": _any,
    "and": _any,
    "add": _all,
    "add_any": _all,
    "sub": _all,
    "or": _all,
    "xor": _all,
    "complex": _all,
    "max": _extremum(1),
    "min": _extremum(-1),
    "clamp": _clamp,
    "select_n": _select,
    "integer_pow": _power,
    "pow": _power,
    "div": _divide,
    "rem": _divide,
    "reduce_sum": _sum,
    "dot_general": _dot,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "concatenate": _joined,
    "pad": _pad,
    "dynamic_update_slice": _updated,
    "split": _each_part,
    "optimization_barrier": _first_each,
}
