"""Rules of what reads or writes at positions: look-ups, scatters, windows."""

from collections.abc import Sequence
from typing import SupportsInt

from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

from .dims import fix
from .rule import because, Dims, fixed, fresh, Mode, unite_all


def top_k(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """The largest few, and where they are."""
    axis, x = eqn.params["axis"], ins[0]
    fix(x[axis], because(eqn, "the largest along it are chosen"))
    chosen = [fixed(eqn, "the largest", i)[axis] for i in range(len(eqn.outvars))]
    return [(*x[:axis], d, *x[axis + 1 :]) for d in chosen]


def _starts_at_0(eqn: JaxprEqn, d: int, indexed: Sequence[SupportsInt]) -> bool:
    """Whether a window as large as the dim lies on the dim: not beside it."""
    fills = eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP
    return d not in indexed or not fills


def gather(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """Windows of `x` at `indices`; a window that is all of a dim leaves it as it is."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    x, indices = ins
    batching = numbers.operand_batching_dims
    shared = dict(zip(batching, numbers.start_indices_batching_dims, strict=True))
    for d, j in shared.items():
        unite_all(eqn, [x[d], indices[j]])
    out = list(fixed(eqn, "a look-up"))
    windows = iter(numbers.offset_dims)
    for d, n in enumerate(sizes):
        if d in shared:
            continue
        whole = n == x[d].size and _starts_at_0(eqn, d, numbers.start_index_map)
        if not whole:
            fix(x[d], because(eqn, "positions along it are looked up"))
        if d not in numbers.collapsed_slice_dims:
            at = next(windows)
            out[at] = x[d] if whole else out[at]
    rest = (d for d in range(len(out)) if d not in numbers.offset_dims)
    for d, dim in zip(rest, indices[:-1], strict=True):
        out[d] = dim
    return [tuple(out)]


def dynamic_slice(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """One window, at a place that is known at run time."""
    out = list(fresh(eqn))
    for d, (x, n) in enumerate(zip(ins[0], eqn.params["slice_sizes"], strict=True)):
        if n == x.size:
            out[d] = x
        else:
            fix(x, because(eqn, "a part of it is chosen at run time"))
            fix(out[d], because(eqn, "a part chosen at run time"))
    return [tuple(out)]


def dynamic_update_slice(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """One window of `x` is replaced, at a place that is known at run time."""
    x, update = ins[:2]
    for a, b in zip(x, update, strict=True):
        if a.size == b.size:
            unite_all(eqn, [a, b])
        else:
            fix(a, because(eqn, "a part of it is overwritten at run time"))
            fix(b, because(eqn, "it overwrites a part of another"))
    return [x]


def scatter(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """Windows of `updates` are written into `x`, or combined with what is there."""
    numbers = eqn.params["dimension_numbers"]
    x, indices, updates = ins
    batching = numbers.operand_batching_dims
    shared = dict(zip(batching, numbers.scatter_indices_batching_dims, strict=True))
    windows = iter(numbers.update_window_dims)
    for d, dim in enumerate(x):
        if d in shared:
            unite_all(eqn, [dim, indices[shared[d]]])
        elif d in numbers.inserted_window_dims:
            fix(dim, because(eqn, "positions along it are written"))
        else:
            update = updates[next(windows)]
            whole = update.size == dim.size
            if whole and _starts_at_0(eqn, d, numbers.scatter_dims_to_operand_dims):
                unite_all(eqn, [dim, update])
            else:
                fix(dim, because(eqn, "a part of it is written"))
                fix(update, because(eqn, "it is written into a part of another"))
    rest = [d for d in range(len(updates)) if d not in numbers.update_window_dims]
    for d, (j, index) in zip(rest, enumerate(indices[:-1]), strict=True):
        unite_all(eqn, [updates[d], index])
        if j not in shared.values():
            fix(index, because(eqn, "each is written to a position of its own"))
    return [x]


SCATTERS = (
    "scatter scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul "
    "scatter-min scatter_min scatter-max scatter_max".split()
)


def _slides(eqn: JaxprEqn, d: int) -> bool:
    """Whether a window does more along a dim than to look at each entry alone."""
    p = eqn.params
    dilation = p.get("base_dilation") or (1,) * (d + 1)
    still = p["window_dimensions"][d] == p["window_strides"][d] == dilation[d] == 1
    return not still or tuple(p["padding"][d]) != (0, 0)


def reduce_window(mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]) -> list[Dims]:
    """Of one or several arrays at once."""
    out = list(fixed(eqn, "a sliding window"))
    arrays = [x for x in ins if len(x) == len(out)]  # what else there is starts a sum
    for d in range(len(out)):
        x = unite_all(eqn, [dims[d] for dims in arrays])
        if _slides(eqn, d):
            fix(x, because(eqn, "a sliding window along it"))
        else:
            out[d] = x
    return [tuple(out)] * len(eqn.outvars)


def select_and_scatter_add(
    mode: Mode, eqn: JaxprEqn, ins: Sequence[Dims]
) -> list[Dims]:
    """The gradient of the largest in each window goes where it was."""
    gradient, x = ins
    for d, (a, b) in enumerate(zip(gradient, x, strict=True)):
        if _slides(eqn, d):
            fix(a, because(eqn, "a sliding window"))
            fix(b, because(eqn, "a sliding window along it"))
        else:
            unite_all(eqn, [a, b])
    return [x]
