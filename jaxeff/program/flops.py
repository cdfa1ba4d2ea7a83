"""Floating-point operations of one equation, by the compiler's own convention.

A multiply-add is 2; an elementwise operation, a cast too, is 1 per element of
its result; functions like `exp` are counted apart (`transcendentals`); moving
data is 0. Convolutions do not count what falls on padding or between dilated
elements.

Law: on a program without loops and branches the sums over all equations are
those of XLA's `HloCostAnalysis` before optimisation, but for: what is folded
because it acts on constants alone; functions that XLA writes out as
polynomials (`erf_inv`, `sinh` ...: one transcendental here); random bits, FFTs,
triangular solves and their like (0 here); cumulative sums (n - 1 operations for
n elements here; XLA counts the window it would slide on some devices); and
ragged products (only rows that meet their group here; all rows in all groups
where XLA masks). A cond counts all its branches, a scan all its turns.
"""

import math

import numpy as np
from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

# What XLA's HloCostAnalysis counts as transcendental, and not as FLOPs.
TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p logistic tanh sin cos tan sqrt rsqrt cbrt pow erf "
    "atan2 erf_inv erfc asin acos atan sinh cosh asinh acosh atanh lgamma "
    "digamma".split()
)
ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign floor ceil round nextafter is_finite "
    "and or xor not eq ne lt le gt ge select_n clamp shift_left "
    "shift_right_logical shift_right_arithmetic square add_any population_count "
    "clz complex reduce_precision bitcast_convert_type".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or "
    "reduce_xor".split()
)
# Compares value and index; and looks out for NaN.
_ARGUMENTS = frozenset(["argmax", "argmin"])
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
_WINDOWS = frozenset("reduce_window_sum reduce_window_max reduce_window_min".split())
_SCATTERS = frozenset(
    "scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul "
    "scatter-min scatter_min scatter-max scatter_max".split()
)
_RAGGED = frozenset(["ragged_dot", "ragged_dot_general"])
MATMULS = frozenset(["dot_general", "conv_general_dilated"]) | _RAGGED
# What a function costs beside its transcendental: 1 / (1 + exp(-x)), exp(x log 2).
_BESIDE = {"logistic": 3, "exp2": 1}


def equation_flops(eqn: JaxprEqn) -> int:
    """FLOPs of one run of an equation, bodies not entered."""
    if not eqn.outvars:
        return 0
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    sizes = [v.aval.size for v in eqn.invars]
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        k = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
        return 2 * out.size * k
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name in _RAGGED:
        return 2 * out.size * eqn.invars[0].aval.shape[-1]
    if name in ELEMENTWISE:
        return out.size
    if name in _BESIDE:
        return out.size * _BESIDE[name]
    if name == "convert_element_type":  # to a weaker type of the same width: nothing
        return out.size if eqn.invars[0].aval.dtype != out.dtype else 0
    if name == "integer_pow":  # repeated squaring, and 1 / x
        n = abs(eqn.params["y"])
        products = n.bit_length() - 1 + n.bit_count() - 1 if n else 0
        return out.size * (products + (eqn.params["y"] < 0))
    if name in _REDUCTIONS:
        return max(sizes[0] - out.size, 0)
    if name in _ARGUMENTS:
        inexact = np.issubdtype(eqn.invars[0].aval.dtype, np.inexact)
        return (9 if inexact else 7) * max(sizes[0] - out.size, 0)
    if name in _CUMULATIVE:
        return out.size - out.size // max(out.shape[eqn.params["axis"]], 1)
    if name in _WINDOWS:
        return out.size * (math.prod(eqn.params["window_dimensions"]) - 1)
    if name == "sort":  # comparisons
        return sizes[0] * max(sizes[0] - 1, 0).bit_length()
    if name == "gather":
        return _gather_flops(eqn)
    if name in _SCATTERS:
        return sizes[2]
    return 0


def equation_transcendentals(eqn: JaxprEqn) -> int:
    """Evaluations of functions like `exp` in one run of an equation."""
    return eqn.outvars[0].aval.size if eqn.primitive.name in TRANSCENDENTAL else 0


def _gather_flops(eqn: JaxprEqn) -> int:
    """Indices out of bounds are found and what they give is filled, or nothing."""
    if eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return 0
    indices, out = eqn.invars[1].aval, eqn.outvars[0].aval
    looks = indices.size // max(indices.shape[-1], 1)
    return 4 * indices.size - looks + out.size


def _conv_flops(eqn: JaxprEqn) -> int:
    p = eqn.params
    x, w, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    numbers = p["dimension_numbers"]
    positions = 1
    for i, (xd, wd, od) in enumerate(
        zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            strict=True,
        )
    ):
        positions *= _valid_positions(
            x.shape[xd],
            w.shape[wd],
            out.shape[od],
            p["window_strides"][i],
            p["padding"][i][0],
            p["lhs_dilation"][i],
            p["rhs_dilation"][i],
        )
    batch, features = out.shape[numbers.out_spec[0]], w.shape[numbers.rhs_spec[0]]
    per_group = w.shape[numbers.rhs_spec[1]]
    return 2 * positions * batch * features * per_group


def _valid_positions(n, window, outs, stride, pad, x_dilation, w_dilation) -> int:
    """Pairs of window element and output position that meet a real input element."""
    at = np.arange(window)[:, None] * w_dilation + np.arange(outs) * stride - pad
    inside = (at >= 0) & (at < (n - 1) * x_dilation + 1) & (at % x_dilation == 0)
    return int(inside.sum())
