"""Floating-point operations of one equation, by the compiler's own convention.

A multiply-add is 2; an elementwise operation is 1 per element of its result;
functions like `exp` are counted apart (`transcendentals`); moving data is 0.
Convolutions do not count what falls on padding or between dilated elements.
"""

import math

import numpy as np
from jax.extend.core import JaxprEqn

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
    "clz".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "cumsum cumprod cummax cummin cumlogsumexp".split()
)
MATMULS = frozenset(["dot_general", "conv_general_dilated", "ragged_dot"])


def equation_flops(eqn: JaxprEqn) -> int:
    """FLOPs of one run of an equation, bodies not entered."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        k = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
        return 2 * out.size * k
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name == "ragged_dot":
        return 2 * out.size * eqn.invars[0].aval.shape[-1]
    if name in ELEMENTWISE:
        return out.size
    if name == "integer_pow":  # repeated squaring
        n = abs(eqn.params["y"])
        return out.size * (n.bit_length() - 1 + n.bit_count() - 1)
    if name in REDUCTIONS:
        return max(eqn.invars[0].aval.size - out.size, 0)
    return 0


def equation_transcendentals(eqn: JaxprEqn) -> int:
    """Evaluations of functions like `exp` in one run of an equation."""
    return eqn.outvars[0].aval.size if eqn.primitive.name in TRANSCENDENTAL else 0


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
    return 2 * positions * batch * features * per_group // p["batch_group_count"]


def _valid_positions(n, window, outs, stride, pad, x_dilation, w_dilation) -> int:
    """Pairs of window element and output position that meet a real input element."""
    at = np.arange(window)[:, None] * w_dilation + np.arange(outs) * stride - pad
    inside = (at >= 0) & (at < (n - 1) * x_dilation + 1) & (at % x_dilation == 0)
    return int(inside.sum())
