"""Quantizes the weights of a function, by pattern.

Which weights share a scale follows from how the function uses each: a scale is
the same along every dim that some use sums over, so that it can move to the
output. Rounding itself is in `arrays.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxeff import tree
from jaxeff.program import is_leaf, lift, relative_error, Site, trace

from .arrays import QArray, quantize_array, store
from .choice import AnyFormat, Choice
from .codebook import Codebook
from .formats import Format, int8
from .grids import named
from .importance import importances
from .learn import learn
from .linear import Linear
from .log import Log
from .products import longest_sum
from .ranges import activation_scales
from .scales import method_for, Scales
from .vector import VectorArray

Formats = AnyFormat | Mapping[str, AnyFormat | None]


ALREADY = "it is quantized already"
_AGAIN = (
    "To store them in another format quantize the weights they were made of, all "
    "formats in one call; `convert` stores what `fake_quantize` has made."
)


def quantize(
    fn: Callable,
    params: PyTree,
    *args: Any,
    formats: Formats | None = None,
    fit: str = "absmax",
    batches: Iterable[tuple] | None = None,
    log: Log | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """The function, and its weights rounded to the nearest of few numbers.

    Args:
        fn: `fn(params, *args)`.
        params: its weights. Those that are factored already have their factors
            quantized; those that are quantized stay. May be shapes.
        args: example inputs, arrays or shapes.
        formats: one format for every weight of two dims or more, by default `int8`;
            or pattern -> format, where of several patterns that match a weight the
            first counts, and None leaves it as it is. Weights that no product,
            convolution or look-up uses (biases, norms) stay.
        fit: how the scale of a block is found: "absmax", so that nothing is clipped;
            "mse", by the least squared error of the weights; "output", by that of
            the outputs, as far as the mean square of each input tells; "hqq", for
            formats with a zero point, by one that is no integer ("mse" for others
            beside them). Codebooks are fitted to "output" or else to the weights.
        batches: tuples of arguments, for "output" and for formats whose activations
            have a range.
        log: collects format, error and time of each weight.
        progress: whether to show a bar where there is data and a terminal.

    Returns:
        `lift(fn)`, which multiplies by the integers, and the new weights.

    Raises:
        ValueError: a pattern matches no weight, or none that can be quantized; a
            format is none, or does not fit a weight; it needs data, and there is
            none; a weight is not finite.
    """
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    check_fit(fit, choices)
    given = None if batches is None else list(batches)
    x_scales = activation_scales(fn, params, given, choices)
    weighed = None
    if fit == "output":
        weighed = importances(fn, params, args, given or [], choices, progress)
        fit = "mse"
    known = {"x_scales": x_scales, "importance": weighed, "log": log}
    return lift(fn), apply(params, choices, fit=fit, **known)


def check_formats(formats: Any) -> None:
    """Refuses what is no format, and what is no dict of formats."""
    given = formats.values() if isinstance(formats, Mapping) else [formats]
    for f in given:
        if f is not None and not isinstance(f, AnyFormat):
            raise ValueError(
                f"a format is `quantization.int8`, `int4`, `w8a8`, another `Format` "
                f"or a `Codebook`, got {f!r}. Pass one for all weights, or a dict from "
                "patterns to them."
            )


def check_fit(fit: str, choices: list[Choice]) -> None:
    """Refuses "hqq" where no format has a zero point."""
    grids = [c.format.grid for c in choices if isinstance(c.format, Format)]
    if fit == "hqq" and grids and not any(g.has_zero_point for g in grids):
        raise ValueError(
            f'"hqq" moves zero points, and {grids[0].name} has none: choose `uint4` or '
            'another asymmetric format, or "mse".'
        )


def apply(
    params: PyTree,
    choices: list[Choice],
    *,
    fit: str = "absmax",
    scales: Mapping[str, Scales] | None = None,
    x_scales: Mapping[str, Array] | None = None,
    importance: Mapping[str, Array] | None = None,
    stored: Mapping[str, Any] | None = None,
    log: Log | None = None,
) -> PyTree:
    """The weights, each in the format chosen for it.

    Args:
        params: the weights.
        choices: from `choose`.
        fit: how scales are found, see `scales.fit`.
        scales: those that are known already, by path.
        x_scales: of activations, by path.
        importance: what each weight's error counts, by path.
        stored: weights that are in their format already, by path.
        log: collects those weights that are neither in `scales` nor in `stored`.
    """
    stored = stored or {}
    scales, x_scales, importance = scales or {}, x_scales or {}, importance or {}
    values, treedef = jax.tree.flatten(params, is_leaf=is_quantized)

    def new(x: Any, c: Choice) -> Any:
        if c.format is None:
            return x
        q = stored.get(c.path)
        if q is None:
            known = scales.get(c.path)
            q = round_weight(x, c, fit, known, importance.get(c.path))
            if log is not None and known is None:
                log.add(c.path, 0, c.format.name, relative_error(x, q))
        if c.path in x_scales:
            q = dataclasses.replace(q, x_scale=x_scales[c.path])
        return q

    new_values = [new(x, c) for x, c in zip(values, choices, strict=True)]
    return jax.tree.unflatten(treedef, new_values)


def round_weight(
    x: Any,
    choice: Choice,
    fit: str = "absmax",
    scales: Scales | None = None,
    importance: Array | None = None,
) -> Any:
    """One weight in its format, or the shape of that for the shape of one.

    Args:
        x: the weight.
        choice: with a format.
        fit, scales, importance: as for `apply`, for this one.
    """
    c, format = choice, choice.format
    if isinstance(format, Format):
        fit = method_for(format, fit)
    if isinstance(format, Codebook):
        round_it = lambda w: _learn(w, format, c.contract, c.batch, importance)
    elif scales is not None:
        round_it = lambda w: _store(w, format, scales, c.batch)
    else:
        round_it = lambda w: _round(w, format, c.contract, c.batch, fit, importance)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(round_it, x)
    return round_it(x)


def check_finite(path: str, x: Any) -> None:
    """Refuses NaN and infinities, where the numbers are there to be seen."""
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        return
    bad = int(jnp.sum(~jnp.isfinite(x)))
    if bad:
        raise ValueError(
            f"{bad} of the {x.size:,} numbers of {path} are NaN or infinite, so no "
            "scale fits it. Check the training, or leave the weight out."
        )


_round = jax.jit(
    lambda w, format, contract, batch, fit, importance: quantize_array(
        w, format, contract, batch, fit=fit, importance=importance
    ),
    static_argnums=(1, 2, 3, 4),
)
_store = jax.jit(store, static_argnums=(1, 3))
_learn = jax.jit(
    lambda w, format, contract, batch, importance: learn(
        w, format, contract, batch, importance=importance
    ),
    static_argnums=(1, 2, 3),
)


def choose(
    fn: Callable, params: PyTree, args: tuple, formats: Formats | None
) -> list[Choice]:
    """What becomes of each array among the weights; see `quantize`.

    Raises:
        ValueError: as `quantize`, but for what its data are.
    """
    arrays = tree.paths(params, is_quantized)
    weights = _weights(params, arrays)
    uses: dict[str, list[Site]] = {path: [] for path in arrays}
    for site in trace(lift(fn), params, *args).sites:
        uses.get(site.path, []).append(site)
    reasons = {p: _why_not(x, uses[p]) for p, x in arrays.items()}
    # A leaf that multiplies as a whole, as one that is trained to be rounded.
    used = {weights[p] for p in arrays if uses[p]}
    whole = {p for p, w in weights.items() if w != p and w not in used}
    reasons |= dict.fromkeys(whole, ALREADY)
    if formats is None or isinstance(formats, AnyFormat):
        fmt = formats or int8
        asked: dict[str, AnyFormat | None] = {
            p: fmt for p, x in arrays.items() if not reasons[p] and x.ndim > 1
        }
        if not asked:
            raise ValueError(_nothing_to_quantize(reasons))
    else:
        asked = _asked(formats, weights, reasons)
    choices = [
        _choice(p, weights[p], asked.get(p), reasons[p], arrays[p], uses[p])
        if p in asked
        else Choice(p, weights[p], None, reasons[p] or "no pattern matches it")
        for p in arrays
    ]
    for c in choices:
        if c.format is not None:
            check_finite(c.path, arrays[c.path])
    return choices


def is_quantized(x: Any) -> bool:
    """Whether it is a weight in few bits."""
    return isinstance(x, QArray | VectorArray)


def _weights(params: PyTree, arrays: Mapping[str, Any]) -> dict[str, str]:
    """For each array the path of the weight it is, or is a part of."""
    parts = {}
    for path, x in tree.paths(params, is_leaf).items():
        inner = tree.paths(x, is_quantized) if is_leaf(x) else {"": x}
        for name in inner:
            parts[f"{path}/{name}" if name else path] = path
    return {p: parts[p] for p in arrays}


def _why_not(x: Any, uses: list[Site]) -> str:
    if is_quantized(x):
        return ALREADY
    if not tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"it is no floating-point array ({getattr(x, 'dtype', type(x))})"
    if x.size == 0:
        return "it has no numbers"
    return "" if uses else "no product, convolution or look-up uses it"


def _asked(
    formats: Mapping[str, AnyFormat | None],
    weights: Mapping[str, str],
    reasons: Mapping[str, str],
) -> dict[str, AnyFormat | None]:
    """The format of each array by the first pattern that matches it."""
    asked: dict[str, AnyFormat | None] = {}
    names = dict.fromkeys([*weights.values(), *weights])
    for pattern, fmt in formats.items():
        found = set(tree.match(pattern, names))
        arrays = [p for p, w in weights.items() if p in found or w in found]
        if fmt is not None and all(reasons[p] for p in arrays):
            again = any(reasons[p] == ALREADY for p in arrays)
            way_out = _AGAIN if again else "Choose a pattern of kernels or embeddings."
            raise ValueError(
                f"pattern {pattern!r} matches {len(arrays)} weights, but none can be "
                f"quantized: {_some({p: reasons[p] for p in arrays})}. {way_out}"
            )
        if fmt is not None and all(p in asked for p in arrays if not reasons[p]):
            raise ValueError(
                f"of several patterns that match a weight the first counts, and those "
                f"before {pattern!r} match all it does. Put it first, or leave it out."
            )
        for p in arrays:
            asked.setdefault(p, fmt)
    if all(fmt is None for fmt in asked.values()):
        raise ValueError(
            f"of the {len(reasons)} weights none has a format: give one, as in "
            '{"**/kernel": quantization.int8}, or leave `formats` out for int8.'
        )
    return asked


def _nothing_to_quantize(reasons: Mapping[str, str]) -> str:
    already = sum(why == ALREADY for why in reasons.values())
    if already:
        return (
            f"{already} of the {len(reasons)} arrays are quantized already, and no "
            f"other one of two dims or more is multiplied or looked up. {_AGAIN}"
        )
    return (
        f"none of the {len(reasons)} weights has two dims or more and is multiplied or "
        f"looked up ({_some(reasons)}): there is nothing to quantize."
    )


def _some(reasons: Mapping[str, str]) -> str:
    first = [f"{p}: {why}" for p, why in reasons.items() if why][:3]
    return "; ".join(first) + (" ..." if len(reasons) > 3 else "")


def _choice(
    path: str, weight: str, fmt: AnyFormat | None, reason: str, x: Any, uses: list[Site]
) -> Choice:
    if fmt is None or reason:
        return Choice(path, weight, None, reason or "its format is None")
    contract = sorted({d for s in uses for d in s.contract})
    if not contract:  # looked up only: a scale for each row
        contract = sorted({d for s in uses for d in s.output})
    batch = sorted({d for s in uses for d in s.batch} - set(contract))
    try:
        _check(fmt, uses, x.shape)
        fmt.blocks(x.shape, contract, batch)
    except ValueError as e:
        raise ValueError(
            f"{path} {tuple(x.shape)} cannot be {fmt.name}: {e} A pattern of its own, "
            "placed first, gives this weight another format."
        ) from None
    return Choice(path, weight, fmt, "", tuple(contract), tuple(batch))


def _check(fmt: AnyFormat, uses: list[Site], shape: tuple[int, ...]) -> None:
    sums = {s.contract for s in uses if s.contract}
    if fmt.group is not None and len(sums) > 1:
        raise ValueError(
            f"groups run along the dims that are summed, but its uses sum over "
            f"different ones: {sorted(sums)}. Leave out the group."
        )
    if fmt.activations is None:
        return
    grid = named(fmt.activations)
    longest = fmt.group or max(
        (math.prod(shape[d] for d in c) for c in sums), default=0
    )
    if (
        isinstance(grid, Linear)
        and isinstance(fmt, Format)
        and isinstance(fmt.grid, Linear)
        and fmt.grid.symmetric  # else activations are rounded, but sums are of floats
    ):
        limit = longest_sum(fmt.grid, grid)
        if longest > limit:
            raise ValueError(
                f"a sum of {longest:,} products of such integers can overflow 32 bits "
                f"(the limit is {limit:,}). Give it smaller groups, `.grouped(n)`."
            )
