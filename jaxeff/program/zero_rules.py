"""For each primitive: where its results are zero, given where its operands are.

`zeros.py` says what for. A rule gets what is known of the operands, and the dims
of operands and results.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.lax import GatherScatterMode

from .dims import atoms, Dim, factor
from .positions import SCATTERS
from .rule import Dims


class Zero(NamedTuple):
    """What is known of an array in the masked program."""

    atoms: frozenset[Dim] = frozenset()  # zero at the removed indices of these
    constant: float | None = None  # every entry is this number

    def has(self, atom: Dim) -> bool:
        """Whether entries at removed indices of an atom are zero."""
        return self.constant == 0 or atom in self.atoms


NOTHING = Zero()


def free_atoms(*arrays: Dims) -> frozenset[Dim]:
    """The atoms of some arrays that may still lose indices."""
    return frozenset(
        a for dims in arrays for d in dims for a in atoms(d) if a.reason is None
    )


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
        for atom in free_atoms((dim,)):
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
        for atom in free_atoms(dims):
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
        for atom in free_atoms(dims):
            out[atom] = out.get(atom, True) and zero.has(atom)
    return [Zero(frozenset(a for a, known in out.items() if known))]


def _pad(zeros, eqn, given, ins, outs) -> list[Zero]:
    x, value = given
    if value.constant != 0:
        return [NOTHING]
    # What was added is zero everywhere; what was there is as it was.
    inside = free_atoms(ins[0])
    known = frozenset(a for a in free_atoms(outs[0]) if a not in inside or x.has(a))
    return [Zero(known)]


def _broadcast(zeros, eqn, given, ins, outs) -> list[Zero]:
    """Along a dim that it is repeated along, an array is not zero anywhere."""
    dims = eqn.params["broadcast_dimensions"]
    old = {d: x for d, x in zip(dims, ins[0], strict=True)}
    repeated = tuple(
        x for d, x in enumerate(outs[0]) if d not in old or old[d].size != x.size
    )
    return [Zero(given[0].atoms - free_atoms(repeated))]


def _looked_up(zeros, eqn, given, ins, outs) -> list[Zero]:
    fill, dtype = eqn.params["fill_value"], eqn.outvars[0].aval.dtype
    if eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP:
        if fill is None:  # so JAX says NaN, or an extreme integer
            fill = np.nan if np.issubdtype(dtype, np.inexact) else 1
        if not (fill == 0 or np.isnan(fill)):  # NaN no sum hides
            return [NOTHING]
    return [Zero(given[0].atoms - free_atoms(ins[1]))]


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


def _scattered(zeros, eqn, given, ins, outs) -> list[Zero]:
    return _joined(zeros, eqn, given[::2], ins[::2], outs)


def _values(zeros, eqn, given, ins, outs) -> list[Zero]:
    """The first result is of the entries of the first operand; others are not."""
    kept = _keep(zeros, eqn, given, ins, outs)
    return [*kept, *([NOTHING] * (len(eqn.outvars) - 1))]


def _updated(zeros, eqn, given, ins, outs) -> list[Zero]:
    return _joined(zeros, eqn, given[:2], ins[:2], outs)


def _first_each(zeros, eqn, given, ins, outs) -> list[Zero]:
    return list(given[: len(eqn.outvars)])


def _each_part(zeros, eqn, given, ins, outs) -> list[Zero]:
    return [given[0]] * len(eqn.outvars)


ZERO_RULES: dict[str, Callable] = {
    **dict.fromkeys(
        "neg sin tan tanh sinh asin asinh atan atanh expm1 log1p sqrt cbrt abs sign "
        "floor ceil round square erf erf_inv real imag conj convert_element_type copy "
        "copy_p stop_gradient reduce_precision name reshape transpose squeeze "
        "slice dynamic_slice rev reduce_max reduce_min reduce_or reduce_xor "
        "reduce_and reduce_prod reduce_window_sum cumsum cumprod cummax cummin fft "
        "bessel_i1e tile sharding_constraint select_and_scatter_add "
        "select_and_gather_add".split(),
        _keep,
    ),
    "sort": _values,
    "top_k": _values,
    **dict.fromkeys(SCATTERS, _scattered),
    "scatter-mul": _keep,
    "scatter_mul": _keep,
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
    "stack": _joined,
    "unstack": _each_part,
    "pad": _pad,
    "dynamic_update_slice": _updated,
    "split": _each_part,
    "optimization_barrier": _first_each,
    "device_put": _first_each,
}
