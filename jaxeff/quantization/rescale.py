"""Weights and activations made easier to round, without a change of the function.

Where a vector can be moved from what produces an activation to what consumes it (see
`program.scalings`), channels that are large in one and small in the other are evened
out. The three ways to choose the vector come from three papers; the function that
results is the same up to rounding, and is quantized as any other.

Sources: Xiao et al. 2022, arXiv:2211.10438, equation 4 (`smooth`); Nagel et al. 2019,
arXiv:1906.04721, section 4.1 (`equalize`); Lin et al. 2023, arXiv:2306.00978, section
3.2 (`awq`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import (
    calibrate,
    check_values,
    coded,
    find_uses,
    gram,
    is_leaf,
    Part,
    Program,
    scale_weights,
    Scaling,
    trace,
)

from . import scales as scaling_of
from .formats import Format

_ROUNDS = 20  # of `equalize`, at most
_EVEN = 1e-3  # its last factors, as logarithms
_ORDER = "Smooth or equalize first, then rotate, then quantize."


@dataclasses.dataclass(frozen=True)
class Move:
    """A scaling whose vector can be moved into weights that sum over it.

    Attributes:
        scaling: with power 1 for the consumers.
        consumers: (path, dim) of the weights that sum over the coupling.
        producers: of the others.
    """

    scaling: Scaling
    consumers: tuple[tuple[str, int], ...]
    producers: tuple[tuple[str, int], ...]


def moves(program: Program) -> list[Move]:
    """The scalings of a program that move a factor into weights that sum over it."""
    summed: dict[tuple[str, int], bool] = {}
    for site in program.sites:
        for d in range(len(program.shapes[site.path].shape)):
            sums = d in site.contract
            summed[site.path, d] = summed.get((site.path, d), True) and sums
    found = []
    for s in program.scalings:
        consumers = tuple(k for k in s.powers if summed.get(k, False))
        producers = tuple(k for k in s.powers if k not in consumers)
        signs = {s.powers[k] for k in consumers}
        if len(signs) != 1 or not producers:
            continue
        (sign,) = signs
        if abs(sign) != 1:
            continue
        turned = {k: sign * e for k, e in s.powers.items()}
        found.append(Move(dataclasses.replace(s, powers=turned), consumers, producers))
    return found


def smooth(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    strength: float | int = 0.5,
    only: tree.Patterns | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Moves what makes activations hard to round into the weights they meet.

    Each channel of an activation is divided by s, and the weights that sum over it
    multiplied, with s = max|x|**strength / max|w|**(1 - strength), over the data and
    over all weights that read the channel.

    Args:
        fn, params, args: as for `quantize`; compressed weights stay as they are.
        batches: tuples of arguments to calibrate with, all of the same shapes.
        strength: 0 evens out the weights, 1 the activations.
        only: patterns of the weights that read what is to be smoothed; by default
            every weight with which that is possible.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `fn` and the new weights, which compute the same up to rounding.

    Raises:
        ValueError: `strength` is outside [0, 1]; there is no data; or nothing of what
            is named can be smoothed, or it is compressed.

    Source: Xiao et al. 2022, arXiv:2211.10438, equation 4.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is a share, in [0, 1], got {strength}.")
    program = trace(fn, params, *args)
    able = _readable(fn, params, args)
    chosen = _chosen(program, only, able)
    tops = [np.zeros(m.scaling.size, np.float32) for m in chosen]

    def look(part, w, top):
        for i, index in _columns(program, chosen, part):
            np.maximum.at(tops[i], index[index >= 0], np.asarray(top)[index >= 0])
        return w

    calibrate(
        fn,
        params,
        batches,
        weights=sorted({path for m in chosen for path, _ in m.consumers}),
        statistic=lambda x: jnp.max(jnp.abs(x), axis=1),
        combine=jnp.maximum,
        update=look,
        progress=progress,
    )
    new = params
    for m, top in zip(chosen, tops, strict=True):
        w = _largest(program, params, m, m.consumers)
        s = _floor(top) ** strength / _floor(w) ** (1 - strength)
        new = scale_weights(new, program.couplings, m.scaling, jnp.asarray(_even(s)))
    return fn, new


def equalize(
    fn: Callable, params: PyTree, *args: Any, only: tree.Patterns | None = None
) -> tuple[Callable, PyTree]:
    """Evens out the channels of consecutive weights; needs no data.

    With r1[c] the largest weight that makes channel c and r2[c] the largest that reads
    it, both become sqrt(r1 r2). Where three weights or more follow each other, a pair
    undoes a part of what the one before it did; so all are gone through again, until
    little changes or for 20 rounds.

    Law: once little changes, r1 and r2 are within 1 % of each other in every channel.
    (Five weights of random numbers in a row get there, with channels 10**6 apart; ten
    get to 10 %.) A channel that nothing makes, or nothing reads, stays as it is.

    Args:
        fn, params, args: as for `quantize`; compressed weights stay as they are.
        only: patterns of the weights that read the channels; by default every weight
            with which that is possible.

    Returns:
        `fn` and the new weights, which compute the same up to rounding.

    Raises:
        ValueError: nothing of what is named can be equalised, or it is compressed; the
            weights have no values.

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1: equation 11, and to repeat
    it until it converges.
    """
    check_values(params, "equalize")
    program = trace(fn, params, *args)
    makes = {(s.path, d) for s in program.sites for d in s.output}
    pairs = [m for m in moves(program) if any(k in makes for k in m.producers)]
    chosen = _chosen(program, only, None, pairs)
    touched = {path for m in chosen for path, _ in m.scaling.powers}
    old = {p: x for p, x in tree.paths(params).items() if p in touched}
    # Rounds of rounding to 16 bits would add up.
    wide = {p: jnp.promote_types(x.dtype, jnp.float32) for p, x in old.items()}
    new = tree.replaced(params, {p: jnp.asarray(x, wide[p]) for p, x in old.items()})
    for _ in range(_ROUNDS):
        most = 0.0
        for m in chosen:
            first = [k for k in m.producers if k in makes]
            r1, r2 = (_largest(program, new, m, k) for k in (first, m.consumers))
            s = np.sqrt(_floor(r1) / _floor(r2))
            s = np.where((r1 > 0) & (r2 > 0), s, 1).astype(np.float32)
            most = max(most, float(np.abs(np.log(s)).max(initial=0)))
            new = scale_weights(new, program.couplings, m.scaling, jnp.asarray(s))
        if most < _EVEN:
            break
    found = tree.paths(new)
    return fn, tree.replaced(
        params, {p: found[p].astype(x.dtype) for p, x in old.items()}
    )


def rescale_by_error(
    fn: Callable,
    params: PyTree,
    args: tuple,
    batches: Iterable[tuple],
    formats: dict[str, Format],
    *,
    steps: int,
    fit: str,
    progress: bool,
) -> PyTree:
    """The weights scaled along their inputs so that rounding costs the outputs least.

    For each activation that several weights may read, s = rms(x)**a with the a in
    0 ... 1 for which their outputs, once rounded, err least.

    Args:
        fn, params, args, batches: as for `quantize`.
        formats: for each weight its format. (While a is looked for, outputs have
            scales of their own.)
        steps: values of a to try, from 0 on.
        fit: how scales are found, see `scales.fit`.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: no weight reads what can be scaled where it is made.

    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2 (there with the mean
    magnitude in place of the root of the mean square).
    """
    program = trace(fn, params, *args)
    able = _readable(fn, params, args) & set(formats)
    chosen = _chosen(program, None, able)
    shares = np.arange(steps) / max(1, steps - 1)
    errors = np.zeros((len(chosen), steps))
    sizes = [np.zeros(m.scaling.size, np.float32) for m in chosen]

    def look(part, w, h):
        format = formats[part.path]
        rms = np.sqrt(np.asarray(jnp.diagonal(h, axis1=1, axis2=2)))
        for n, index in _columns(program, chosen, part):
            np.maximum.at(sizes[n], index[index >= 0], rms[index >= 0])
            each = np.where(index >= 0, _floor(rms), 1.0)
            group = format.group or part.cols
            shared = (1, 1, group if part.cols % group == 0 else part.cols)
            for i, a in enumerate(shares):
                by = jnp.asarray(_even(each**a))[:, None]
                errors[n, i] += float(_lost(w, h, by, format, shared, fit))
        return w

    calibrate(
        fn,
        params,
        batches,
        weights=sorted({path for m in chosen for path, _ in m.consumers}),
        statistic=gram,
        update=look,
        progress=progress,
    )
    new = params
    for m, size, lost in zip(chosen, sizes, errors, strict=True):
        s = jnp.asarray(_even(_floor(size) ** shares[int(np.argmin(lost))]))
        new = scale_weights(new, program.couplings, m.scaling, s)
    return new


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _lost(
    w: Float[Array, "groups rows cols"],
    h: Float[Array, "groups cols cols"],
    by: Float[Array, "groups 1 cols"],
    format: Format,
    shared: tuple[int, ...],
    fit: str,
) -> Float[Array, ""]:
    """The squared error of outputs when weights times `by` are rounded."""
    method = scaling_of.method_for(format, fit)
    found = scaling_of.fit(w * by, format, shared, (0,), method=method)
    off = scaling_of.apply(w * by, found, format.grid) / by - w
    return jnp.einsum("grc,gcd,grd->", off, h, off, precision="highest")


def _readable(fn: Callable, params: PyTree, args: tuple) -> set[str]:
    """The weights of whose inputs a statistic can be taken."""
    candidates = find_uses(fn, params, args).candidates
    return {p for p, c in candidates.items() if not c.reason and not c.looked_up}


def _chosen(
    program: Program,
    only: tree.Patterns | None,
    able: set[str] | None,
    given: list[Move] | None = None,
) -> list[Move]:
    """The moves whose consumers are named, and can be seen."""
    leaves = tree.paths(program.call.params, is_leaf)
    forms = {
        path: getattr(x, "format", type(x).__name__.lower())
        for path, x in leaves.items()
        if is_leaf(x)
    }
    found = moves(program) if given is None else given
    inside = coded(program.call.params)
    reasons = {p: "" for p in program.shapes if p not in inside}
    reasons |= {p: f"it is compressed already ({form})" for p, form in forms.items()}
    named = set(reasons)
    if only is not None:
        patterns = [only] if isinstance(only, str) else only
        tree.check_some(patterns, reasons, does="scales", way_out=_ORDER)
        named = set(tree.match(only, reasons))
    ok = lambda path: path in named and (able is None or path in able)
    found = [m for m in found if all(ok(path) for path, _ in m.consumers)]
    if found:
        return found
    named &= {site.path for site in program.sites}
    if forms:
        listed = ", ".join(f"{path} ({form})" for path, form in forms.items())
        are = "is" if len(forms) == 1 else "are"
        others = ", and what lies between others passes no factor on" if named else ""
        raise ValueError(
            f"no channel is left to scale between dense weights: {listed} {are} "
            f"compressed already{others}. {_ORDER}"
        )
    raise ValueError(
        f"none of the {len(named)} weights reads channels that can be scaled where "
        "they are made, and back here, without changing the function: between "
        "them lies an operation that passes no factor on (gelu, softmax, a norm "
        "without a scale). `trace(fn, params, *args).scalings` lists those that can."
    )


def _columns(program: Program, chosen: list[Move], part: Part) -> Any:
    """For the moves into a part, their number, and each column's index or -1."""
    first = np.asarray(part.elements)[:, 0, :]
    where = np.unravel_index(first, program.shapes[part.path].shape)
    for n, m in enumerate(chosen):
        for path, d in m.consumers:
            if path != part.path:
                continue
            for name, index in program.couplings.occurrences(path, d):
                if name == m.scaling.coupling:
                    yield n, index[where[d]]


def _largest(program: Program, params: PyTree, m: Move, keys: Any) -> np.ndarray:
    """For each index of a coupling the largest magnitude in those dims of weights."""
    weights, top = tree.paths(params), np.zeros(m.scaling.size, np.float32)
    for path, d in keys:
        w = np.abs(np.asarray(weights[path], np.float32))
        line = w.max(tuple(i for i in range(w.ndim) if i != d))
        for name, index in program.couplings.occurrences(path, d):
            if name == m.scaling.coupling:
                np.maximum.at(top, index[index >= 0], line[index >= 0])
    return top


def _floor(x: Any) -> np.ndarray:
    """Channels that are never used count as the smallest that is."""
    x = np.asarray(x, np.float32)
    used = x[x > 0]
    return np.maximum(x, max(used.min(), 1e-5 * x.max()) if used.size else 1.0)


def _even(s: np.ndarray) -> np.ndarray:
    """With the largest and the smallest as far from 1."""
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)
