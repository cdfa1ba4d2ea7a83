"""Runs a function on compressed weights, each multiplied in its own way.

`lift(fn)` traces `fn` on the dense shapes of its weights and runs the trace
again with the leaves in place: `dot_general`, convolution and look-up on a
leaf are the leaf's own; views of a weight (transpose, reshape, cast) stay
leaves; any other operation gets `dense()`. `lift_report` tells which was which.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from .call import Call, Rewritten
from .interpret import bind, Interpreter, rebuilt
from .leaf import Conv, dense, dot_of, is_leaf, lookup_dim
from .sites import follow, weight_origins
from .source import source_line
from .walk import Where


@dataclasses.dataclass(frozen=True)
class Lifted(Rewritten):
    """A function that accepts compressed weights; see `lift`."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn` on the weights the leaves stand for."""
        operands = jax.tree.leaves((params, args, kwargs), is_leaf=is_leaf)
        if not any(map(is_leaf, operands)):
            return self.fn(params, *args, **kwargs)
        return Call(self.fn, params, args, kwargs).run(self.rule())

    def rule(self) -> "Lifting":
        """How operations on leaves are run."""
        return Lifting()

    def settings(self) -> dict[str, Any]:
        """None are needed."""
        return {}


def lift(fn: Callable) -> Callable:
    """Makes `fn(params, *args)` accept compressed weights among its parameters.

    Laws: without a leaf in `params` it *is* `fn`; with leaves it equals `fn` on
    `dense(params)` up to the rounding of the leaves' own formats. It can be
    jitted, differentiated, vmapped, and lifted again, which changes nothing.
    """
    return fn if isinstance(fn, Lifted) else Lifted(fn)


def unlift(fn: Callable) -> Callable:
    """The function inside a lifted one; any other function as it is."""
    return fn.fn if isinstance(fn, Lifted) else fn


@dataclasses.dataclass(frozen=True)
class LiftEntry:
    """What became of one use of a compressed weight."""

    path: str
    primitive: str
    native: bool  # False: ran on `dense()`
    source: str


def lift_report(
    fn: Callable, params: Any, *args: Any, **kwargs: Any
) -> list[LiftEntry]:
    """How each use of each leaf runs: natively, or on its dense array.

    Nothing is computed; `args` may be shapes.
    """
    call = Call(unlift(fn), params, args, kwargs)
    rule = Lifting()
    jax.eval_shape(lambda xs: call.run(rule, xs), call.inputs)
    compressed = [
        path if is_leaf(x) else None
        for path, x in zip(call.weights, call.inputs, strict=True)
    ]
    entries: dict[LiftEntry, None] = {}

    def visit(where, eqn, origins, times):
        if where in rule.ran:
            for origin in filter(None, origins):
                native = rule.ran[where]
                name = eqn.primitive.name
                entries[LiftEntry(origin.path, name, native, source_line(eqn))] = None

    follow(call.jaxpr, weight_origins(call.jaxpr, compressed), visit)
    return list(entries)


class Lifting(Interpreter):
    """Hands operations on a leaf to the leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[Where, bool] = {}  # whether the leaf did it natively

    def plain(self, x: Any) -> Any:
        """A leaf's dense array."""
        return dense(x)

    def opens(self, eqn: JaxprEqn, args: list[Any]) -> bool:
        """A body that no leaf enters runs whole."""
        return any(map(is_leaf, args))

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        """A leaf's own way to do it, or the same on its dense array."""
        if not any(map(is_leaf, args)):
            return None
        if rebuilt(eqn.primitive.name):
            # These keep a rule or a sharding of their own, and take arrays only.
            if eqn.primitive.name.startswith(("custom_", "shard_map")):
                self.ran[where] = False
            return None
        rule = _RULES.get(eqn.primitive.name)
        out = NotImplemented if rule is None else _apply(rule, eqn, args)
        if rule in _VIEWS and out is not NotImplemented:
            return out if isinstance(out, list) else [out]  # nothing has run yet
        self.ran[where] = out is not NotImplemented
        return [out] if self.ran[where] else bind(eqn, [self.plain(x) for x in args])


class _Declined(Exception):
    """A leaf does not know how to do it."""


def _apply(rule: Callable, eqn: JaxprEqn, args: list[Any]) -> Any:
    """A rule on operands whose leaves may be made of leaves (quantized factors).

    What a leaf does with its parts it does by ordinary operations; where a part is
    a leaf itself, these are run lifted in their turn.
    """
    inside = lambda x: is_leaf(x) and not any(x is a for a in args)
    parts, treedef = jax.tree.flatten(args, is_leaf=inside)
    if rule in _VIEWS or not any(map(is_leaf, parts)):
        return rule(eqn, args)

    def run(parts):
        out = rule(eqn, jax.tree.unflatten(treedef, parts))
        if out is NotImplemented:
            raise _Declined
        return out

    try:
        return Lifted(run)(parts)
    except _Declined:
        return NotImplemented


def _convert(eqn: JaxprEqn, args: list[Any]) -> Any:
    return args[0].astype(eqn.params["new_dtype"])


def _transpose(eqn: JaxprEqn, args: list[Any]) -> Any:
    return args[0].transpose(tuple(eqn.params["permutation"]))


def _reshape(eqn: JaxprEqn, args: list[Any]) -> Any:
    if eqn.params["dimensions"] is not None:  # it would transpose first
        return NotImplemented
    return _squeeze(eqn, args)


def _squeeze(eqn: JaxprEqn, args: list[Any]) -> Any:
    return args[0].reshape(tuple(eqn.outvars[0].aval.shape))


def _broadcast(eqn: JaxprEqn, args: list[Any]) -> Any:
    # Only new dims of size 1, which is a reshape.
    x, shape = args[0], tuple(eqn.params["shape"])
    dims = eqn.params["broadcast_dimensions"]
    same = [shape[d] for d in dims] == list(x.shape) and list(dims) == sorted(dims)
    ones = all(n == 1 for d, n in enumerate(shape) if d not in dims)
    return x.reshape(shape) if same and ones else NotImplemented


def _slice(eqn: JaxprEqn, args: list[Any]) -> Any:
    begin, end = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(begin)
    return _part(args[0], list(map(range, begin, end, strides)))


def _split(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, axis = args[0], eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    parts = []
    for end, size in zip(ends, eqn.params["sizes"], strict=True):
        kept = [range(n) for n in x.shape]
        kept[axis] = range(end - size, end)
        parts.append(_part(x, kept))
    return NotImplemented if any(p is NotImplemented for p in parts) else parts


def _part(x: Any, kept: list[range]) -> Any:
    for dim, indices in enumerate(kept):
        if not indices:
            return NotImplemented
        if len(indices) < x.shape[dim]:
            mask = np.zeros(x.shape[dim], bool)
            mask[list(indices)] = True
            x = x.keep(dim, mask)
            if x is NotImplemented:
                return x
    return x


def _identity(eqn: JaxprEqn, args: list[Any]) -> Any:
    return args[0]


def _barrier(eqn: JaxprEqn, args: list[Any]) -> Any:
    return args[0] if len(args) == 1 else NotImplemented


def _stop_gradient(eqn: JaxprEqn, args: list[Any]) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, args[0])


def _dot(eqn: JaxprEqn, args: list[Any]) -> Any:
    if is_leaf(args[1]):
        return args[1].dot(dense(args[0]), dot_of(eqn, 1))
    return args[0].dot(args[1], dot_of(eqn, 0))


def _conv(eqn: JaxprEqn, args: list[Any]) -> Any:
    if is_leaf(args[0]):  # a weight that is convolved is no kernel
        return NotImplemented
    return args[1].conv(args[0], Conv(dict(eqn.params)))


def _gather(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, indices = args
    dim, fill = lookup_dim(eqn), eqn.params["fill_value"]
    if dim is None or not is_leaf(x):
        return NotImplemented
    if fill is not None and fill != 0 and not np.isnan(fill):
        return NotImplemented  # rows out of bounds are of a value no leaf can store

    def gather(array):
        sizes = tuple(1 if d == dim else n for d, n in enumerate(array.shape))
        params: dict[str, Any] = {**eqn.params, "slice_sizes": sizes}
        if not np.issubdtype(array.dtype, np.inexact):
            params["fill_value"] = 0  # the weight's own, NaN, is no integer
        return jax.lax.gather_p.bind(array, indices, **params)

    return x.take(gather, dim)


# These only change how a leaf is seen, by methods that arrays and leaves share.
_VIEWS = (
    _convert,
    _transpose,
    _reshape,
    _broadcast,
    _slice,
    _split,
    _identity,
    _barrier,
    _stop_gradient,
)

_RULES: dict[str, Callable[[JaxprEqn, list[Any]], Any]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "copy": _identity,
    "copy_p": _identity,
    "stop_gradient": _stop_gradient,
    "optimization_barrier": _barrier,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
