"""For each primitive: which dims of its results are which dims of its operands.

What a rule is, `rule.py` says; those of look-ups, scatters and windows are in
`positions.py`. A primitive without a rule fixes all it touches.
"""

from collections.abc import Sequence
from typing import SupportsInt

from jax.extend.core import JaxprEqn

from . import flops, positions
from .dims import concat, cut, Dim, factor, fix, product
from .rule import because, Dims, fixed, fresh, Mode, Rule, unite_all, unknown
from .sites import reshape_groups


def elementwise(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """Aligns dims one by one; a dim of size 1 goes with any."""
    out = []
    rank = len(eqn.outvars[0].aval.shape)
    if any(x and len(x) != rank for x in ins):  # a cast of bits to a smaller type
        return unknown(mode, eqn, ins)
    for d, n in enumerate(eqn.outvars[0].aval.shape):
        # A dim of size 1 is repeated, not aligned, unless the result's is 1 too.
        aligned = [x[d] for x in ins if x and x[d].size == n]
        out.append(unite_all(eqn, aligned) if aligned else Dim(n))
    return [tuple(out)] * len(eqn.outvars)


def _same(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    return [tuple(x) for x in ins[: len(eqn.outvars)]]


def _dot_general(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = ins
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unite_all(eqn, [left[i], right[j]])
    batch = [left[i] for i in lb]
    free = [d for i, d in enumerate(left) if i not in (*lc, *lb)]
    free += [d for j, d in enumerate(right) if j not in (*rc, *rb)]
    return [(*batch, *free)]


def _ragged_dot(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    plain = len(groups) == 1 and not lb and not rb
    ragged = numbers.lhs_ragged_dimensions
    if not plain or any(d in lc for d in ragged):
        return unknown(mode, eqn, ins)
    left, right = ins[0], ins[1]
    fix(right[groups[0]], because(eqn, "the groups of a ragged product"))
    for d in ragged:
        fix(left[d], because(eqn, "the ragged rows of a product"))
    for i, j in zip(lc, rc, strict=True):
        unite_all(eqn, [left[i], right[j]])
    free = [d for i, d in enumerate(left) if i not in lc]
    free += [d for j, d in enumerate(right) if j not in (*rc, *groups)]
    return [tuple(free)]


def conv_groups(eqn: JaxprEqn, x: Dims) -> tuple[Dim, Dim] | None:
    """The input channels of a convolution as (groups, channels in each).

    None if they can't be cut so.
    """
    channels = x[eqn.params["dimension_numbers"].lhs_spec[1]]
    return factor(channels, channels.size // eqn.params["feature_group_count"])


def _conv(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    p, (x, w) = eqn.params, ins
    if p["batch_group_count"] != 1:
        return unknown(mode, eqn, ins)
    numbers = p["dimension_numbers"]
    for spec, dims in ((numbers.lhs_spec, x), (numbers.rhs_spec, w)):
        for d in spec[2:]:
            fix(dims[d], because(eqn, "the space of a convolution"))
    groups = p["feature_group_count"]
    w_out, w_in = (w[d] for d in numbers.rhs_spec[:2])
    if groups == 1:
        unite_all(eqn, [x[numbers.lhs_spec[1]], w_in])
    else:
        parts = conv_groups(eqn, x)
        if parts is None:
            for d in (x[numbers.lhs_spec[1]], w_in, w_out):
                fix(d, because(eqn, "the groups of a convolution cut across it"))
        else:
            unite_all(eqn, [parts[1], w_in])
            unite_all(eqn, [product([parts[0], Dim(w_out.size // groups)]), w_out])
    out = list(fixed(eqn, "the space of a convolution"))
    out[numbers.out_spec[0]] = x[numbers.lhs_spec[0]]
    out[numbers.out_spec[1]] = w_out
    return [tuple(out)]


def _reshape(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    old, new = ins[0], list(fresh(eqn))
    if eqn.params.get("dimensions") is not None:
        return unknown(mode, eqn, ins)
    groups = reshape_groups([d.size for d in old], [d.size for d in new])
    for olds, news in groups:
        before = product([old[i] for i in olds])
        wide = [j for j in news if new[j].size != 1]
        if len(wide) == 1:
            new[wide[0]] = before
        elif wide:
            unite_all(eqn, [product([new[j] for j in wide]), before])
    return [tuple(new)]


def _transpose(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    return [tuple(ins[0][d] for d in eqn.params["permutation"])]


def _squeeze(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    gone = eqn.params["dimensions"]
    return [tuple(x for d, x in enumerate(ins[0]) if d not in gone)]


def _broadcast_in_dim(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    out = list(fresh(eqn))
    for d, x in zip(eqn.params["broadcast_dimensions"], ins[0], strict=True):
        if x.size == out[d].size:
            out[d] = x
    return [tuple(out)]


def _reduce(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    gone = eqn.params["axes"]
    out = tuple(x for d, x in enumerate(ins[0]) if d not in gone)
    return [out] * len(eqn.outvars)


def _reduce_exactly(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    for d in eqn.params["axes"]:
        mode.exact(ins[0][d], because(eqn, f"`{eqn.primitive.name}` over it"))
    return _reduce(mode, eqn, ins)


def _reduce_any(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    arrays = ins[: len(eqn.outvars)]
    for dims in arrays:
        for d in eqn.params["dimensions"]:
            mode.exact(dims[d], because(eqn, "`reduce` over it"))
    dims = tuple(unite_all(eqn, same) for same in zip(*arrays, strict=True))
    gone = eqn.params["dimensions"]
    out = tuple(x for d, x in enumerate(dims) if d not in gone)
    return [out] * len(eqn.outvars)


def _along(key: str) -> Rule:
    """For what mixes positions along one dim, and keeps every shape."""

    def rule(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
        mode.exact(
            ins[0][eqn.params[key]], because(eqn, f"`{eqn.primitive.name}` along it")
        )
        outs = elementwise(mode, eqn, ins)[0]
        return [outs] * len(eqn.outvars)

    return rule


def _rev(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    for d in eqn.params["dimensions"]:
        fix(ins[0][d], because(eqn, "its order is reversed"))
    return [ins[0]]


def _concatenate(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    at = eqn.params["dimension"]
    out = []
    for d in range(len(ins[0])):
        dims = [x[d] for x in ins]
        out.append(concat(dims) if d == at else unite_all(eqn, dims))
    return [tuple(out)]


def _stack(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    out = [unite_all(eqn, dims) for dims in zip(*ins, strict=True)]
    out.insert(eqn.params["axis"], concat([Dim(1) for _ in ins]))
    return [tuple(out)]


def _unstack(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    axis, x = eqn.params["axis"], ins[0]
    fix(x[axis], because(eqn, "it is taken apart, index by index"))
    return [(*x[:axis], *x[axis + 1 :])] * len(eqn.outvars)


def _tile(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    copies = lambda n: fix(Dim(n), because(eqn, f"it is repeated {n} times"))
    pairs = zip(eqn.params["reps"], ins[0], strict=True)
    return [tuple(x if n == 1 else product([copies(n), x]) for n, x in pairs)]


def cut_out(d: Dim, start: SupportsInt, stop: SupportsInt) -> tuple[Dim, Dim] | None:
    """The dims before `start` and from there to `stop`; None if they can't be cut."""
    first = cut(d, int(stop))  # a program may hold NumPy integers
    return None if first is None else cut(first[0], int(start))


def _slice(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    p, out = eqn.params, list(fresh(eqn))
    strides = p["strides"] or (1,) * len(out)
    for d, (x, start, stop, step) in enumerate(
        zip(ins[0], p["start_indices"], p["limit_indices"], strides, strict=True)
    ):
        whole = (start, stop, step) == (0, x.size, 1)
        pieces = None if step != 1 or whole else cut_out(x, start, stop)
        one_in_each = out[d].size * step == x.size and start < step
        parts = factor(x, int(step)) if step != 1 and one_in_each else None
        if whole:
            out[d] = x
        elif pieces is not None:
            out[d] = pieces[1]
        elif parts is not None:  # of every `step` the one at `start`: x[1::2]
            fix(parts[1], because(eqn, f"one in {step} of it is taken"))
            out[d] = parts[0]
        else:
            fix(x, because(eqn, f"a slice [{start}:{stop}:{step}] of it"))
            fix(out[d], because(eqn, "a slice"))
    return [tuple(out)]


def _split(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    axis, rest, outs = eqn.params["axis"], ins[0][eqn.params["axis"]], []
    for i, n in enumerate(map(int, eqn.params["sizes"])):
        pieces = cut(rest, n)
        if pieces is None:
            fix(rest, because(eqn, "a split cuts across it"))
            pieces = fixed(eqn, "a split", i)[axis], Dim(rest.size - n)
            fix(pieces[1], because(eqn, "a split"))
        outs.append((*ins[0][:axis], pieces[0], *ins[0][axis + 1 :]))
        rest = pieces[1]
    return outs


def _pad(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    out = list(fresh(eqn))
    for d, (x, (low, high, inner)) in enumerate(
        zip(ins[0], eqn.params["padding_config"], strict=True)
    ):
        if (low, high, inner) == (0, 0, 0):
            out[d] = x
        elif inner or low < 0 or high < 0:
            fix(x, because(eqn, "it is padded inside, or cropped"))
            fix(out[d], because(eqn, "padding"))
        else:
            out[d] = concat([Dim(int(low)), x, Dim(int(high))])
    return [tuple(out)]


def _iota(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    out = fresh(eqn)
    mode.exact(out[eqn.params["dimension"]], because(eqn, "it counts positions"))
    return [out]


def _random_bits(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    for d in ins[0]:
        fix(d, because(eqn, "one random key for each"))
    n, reason = len(ins[0]), because(eqn, "random numbers depend on the shape")
    return [(*ins[0], *(mode.exact(d, reason) for d in fresh(eqn)[n:]))]


def _rng_bits(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    reason = because(eqn, "random numbers depend on the shape")
    return [ins[0], tuple(mode.exact(d, reason) for d in fresh(eqn, 1))]


def _gamma(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    for d in ins[1]:
        fix(d, because(eqn, "random numbers depend on the shape"))
    return [ins[1]]


def _fft(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    first = len(ins[0]) - len(eqn.params["fft_lengths"])
    for d in ins[0][first:]:
        fix(d, because(eqn, "a Fourier transform runs along it"))
    return [(*ins[0][:first], *fixed(eqn, "a Fourier transform")[first:])]


_ELEMENTWISE = (flops.ELEMENTWISE | flops.TRANSCENDENTAL) | frozenset(
    "integer_pow convert_element_type copy copy_p stop_gradient reduce_precision "
    "bitcast_convert_type real imag conj complex name mulhi igamma igammac "
    "igamma_grad_a polygamma zeta bessel_i0e bessel_i1e random_gamma_grad "
    "regularized_incomplete_beta sharding_constraint".split()
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    "optimization_barrier": _same,
    "device_put": _same,
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reduce": _reduce_any,
    "reduce_sum": _reduce,  # zeros.py says where a sum is exact
    **dict.fromkeys(
        "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
        "argmin".split(),
        _reduce_exactly,
    ),
    **dict.fromkeys(
        "cumsum cumprod cummax cummin cumlogsumexp".split(), _along("axis")
    ),
    "sort": _along("dimension"),
    "rev": _rev,
    "top_k": positions.top_k,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "gather": positions.gather,
    "dynamic_slice": positions.dynamic_slice,
    "dynamic_update_slice": positions.dynamic_update_slice,
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split(),
        positions.reduce_window,
    ),
    "select_and_scatter_add": positions.select_and_scatter_add,
    "select_and_gather_add": positions.reduce_window,
    **dict.fromkeys(positions.SCATTERS, positions.scatter),
    "fft": _fft,
    "iota": _iota,
    "random_bits": _random_bits,
    "rng_bit_generator": _rng_bits,
    "random_gamma": _gamma,
}


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether each number of its outputs follows from those in the same place."""
    return eqn.primitive.name in _ELEMENTWISE


def rule_of(eqn: JaxprEqn) -> Rule:
    """The rule of an equation's primitive; one that fixes all it touches if none."""
    return RULES.get(eqn.primitive.name, unknown)
