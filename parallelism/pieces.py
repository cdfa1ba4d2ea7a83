"""Weights that hold several in one, kept as the several.

A kernel whose outputs are queries, keys and values side by side cannot be cut into
equal parts along them: a device would get queries alone. Stored as the three, each is
cut by heads. The function still asks for one array; run on `Pieces` it computes with
each by itself up to where it takes them apart, so nothing is ever put together.

Source of the layout: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (columns of
each of the three by heads).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, PyTree

from jaxeff import tree
from jaxeff.program import (
    bind,
    Call,
    Conv,
    Dot,
    dot_of,
    is_elementwise,
    is_leaf,
    Leaf,
    lift,
    Lifted,
    Lifting,
    shapes,
    unlift,
    Where,
)
from jaxeff.tree import pytree, static


class Division(NamedTuple):
    """How a weight that holds several in one is divided.

    Attributes:
        dim: along which.
        pieces: how long each is, and whether it is to be split.
        coupling: the name of what is split.
    """

    dim: int
    pieces: tuple[tuple[int, bool], ...]
    coupling: str


@pytree
class Pieces(Leaf):
    """Arrays that stand for one, side by side along a dim.

    Attributes:
        arrays: alike but for their lengths along the dim; each may be compressed.
        dim: negative.
        path: of the weight they come from, if that is to be known.
    """

    arrays: tuple[Any, ...]
    dim: int = static()
    path: str = static(default="")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The length of each along the dim."""
        return tuple(a.shape[self.dim] for a in self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the one array."""
        shape = list(self.arrays[0].shape)
        shape[self.dim] = sum(self.sizes)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Of all."""
        return self.arrays[0].dtype

    @property
    def at(self) -> int:
        """The dim, counted from the front."""
        return self.dim + self.ndim

    def dense(self) -> Array:
        """The one array."""
        return jnp.concatenate(self.arrays, self.dim)

    def each(self, fn: Callable[[Any], Any], dim: int | None = None) -> Any:
        """The pieces changed alike; `dim`, from the front, is where they lie then.

        NotImplemented where a piece has no way to do it.
        """
        arrays = tuple(map(fn, self.arrays))
        if any(a is NotImplemented for a in arrays):
            return NotImplemented
        dim = self.dim if dim is None else dim - arrays[0].ndim
        return Pieces(arrays, dim, self.path)

    def cut(self, begin: int, end: int) -> Any:
        """Those between two indices of the dim: pieces, or one array.

        NotImplemented where that is a part of one.
        """
        ends = np.cumsum((0, *self.sizes)).tolist()
        if begin not in ends or end not in ends or begin >= end:
            return NotImplemented
        found = self.arrays[ends.index(begin) : ends.index(end)]
        return found[0] if len(found) == 1 else Pieces(found, self.dim, self.path)

    def astype(self, dtype: Any) -> Any:
        """In another dtype."""
        return self.each(lambda a: a.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """With dims in another order."""
        at = list(permutation).index(self.at)
        return self.each(lambda a: a.transpose(tuple(permutation)), at)

    def reshape(self, shape: Sequence[int]) -> Any:
        """With dims split or merged, where no new index is of two pieces."""
        before = math.prod(self.shape[: self.at])
        after = math.prod(self.shape[self.at + 1 :])
        for at in range(len(shape)):
            if math.prod(shape[:at]) != before:
                continue
            rest = math.prod(shape[at + 1 :])
            if rest and not any(n * after % rest for n in self.sizes):
                if sum(self.sizes) * after == shape[at] * rest:

                    def new(a: Any, at: int = at, rest: int = rest) -> Any:
                        n = a.shape[self.dim] * after // rest
                        return a.reshape((*shape[:at], n, *shape[at + 1 :]))

                    return self.each(new, at)
        return NotImplemented

    def dot(self, x: Array, dot: Dot) -> Any:
        """The products with each, side by side."""
        y = self.products(x, dot)
        return y if y is NotImplemented else y.dense()

    def products(self, x: Array, dot: Dot) -> Any:
        """The product with each."""
        free = dot.dims.w_free(self.ndim)
        if self.at not in free:
            return NotImplemented
        at = dot.output_dims(x.ndim, self.ndim)["w"][free.index(self.at)]
        return self.each(lift(lambda a: dot(x, a)), at)

    def conv(self, x: Array, conv: Conv) -> Any:
        """The convolutions with each, side by side."""
        y = self.convolutions(x, conv)
        return y if y is NotImplemented else y.dense()

    def convolutions(self, x: Array, conv: Conv) -> Any:
        """The convolution with each."""
        groups = [conv.params[f"{of}_group_count"] for of in ("feature", "batch")]
        if self.at != conv.out_dim or groups != [1, 1]:
            return NotImplemented
        return self.each(lift(lambda a: conv(x, a)), conv.output_channel_dim)


@dataclasses.dataclass(frozen=True)
class Piecewise(Lifted):
    """A function that keeps pieces apart for as long as it can.

    Law: it computes what `lift(fn)` computes, and so what `fn` does on the weights
    that the leaves stand for.
    """

    def rule(self) -> Lifting:
        """What is computed from pieces is in pieces."""
        return _Piecewise()


def divide(x: Any, by: Division, path: str = "") -> Pieces:
    """An array, or the shape of one, in pieces."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: divide(x, by, path), x)
    ends = np.cumsum([n for n, _ in by.pieces])[:-1].tolist()
    return Pieces(tuple(jnp.split(x, ends, by.dim)), by.dim - x.ndim, path)


def divided(params: PyTree, pieces: Mapping[str, Division]) -> PyTree:
    """The shapes of weights, those with a division in pieces that know their path."""

    def new(keypath: tuple, x: Any) -> Any:
        path = tree.path_name(keypath)
        return divide(shapes(x), pieces[path], path) if path in pieces else x

    return jax.tree_util.tree_map_with_path(new, params, is_leaf=is_leaf)


def joins(fn: Callable, params: PyTree, args: tuple, kwargs: dict) -> set[str]:
    """The paths of weights whose pieces a function puts together.

    Args:
        fn: `fn(params, *args, **kwargs)`.
        params: from `divided`.
        args, kwargs: the rest, or their shapes.
    """
    if not any(isinstance(x, Pieces) for x in jax.tree.leaves(params, is_leaf=is_leaf)):
        return set()
    call, rule = Call(unlift(fn), params, args, kwargs), _Piecewise()
    jax.eval_shape(lambda xs: call.run(rule, xs), call.inputs)
    return rule.joined


class _Piecewise(Lifting):
    """Computes with each piece by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: set[str] = set()  # paths

    def plain(self, x: Any) -> Any:
        """All pieces as one."""
        if isinstance(x, Pieces) and x.path:
            self.joined.add(x.path)
        return super().plain(x)

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        if any(isinstance(x, Pieces) for x in args):
            rule = _RULES.get(eqn.primitive.name)
            if rule is None and is_elementwise(eqn):
                rule = _elementwise
            out = NotImplemented if rule is None else rule(eqn, args)
            if out is not NotImplemented:
                return out if isinstance(out, list) else [out]
        return super().equation(eqn, args, where)


def _elementwise(eqn: JaxprEqn, args: list[Any]) -> Any:
    first = next(x for x in args if isinstance(x, Pieces))
    ends = np.cumsum(first.sizes)[:-1].tolist()
    given: list[Sequence[Any]] = []
    for x in args:
        if isinstance(x, Pieces):
            if (x.dim, x.sizes) != (first.dim, first.sizes):
                return NotImplemented
            given.append(x.arrays)
        elif isinstance(x, Leaf):
            return NotImplemented
        elif jnp.ndim(x) == 0 or x.shape[first.dim] == 1:
            given.append([x] * len(first.arrays))
        else:
            given.append(jnp.split(x, ends, first.dim))
    one = lift(lambda xs: bind(eqn, xs))
    done = [one(list(each)) for each in zip(*given, strict=True)]
    return [
        Pieces(tuple(outs), first.dim, first.path) for outs in zip(*done, strict=True)
    ]


def _broadcast(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, shape = args[0], tuple(eqn.params["shape"])
    dims = eqn.params["broadcast_dimensions"]
    at = dims[x.at]

    def wider(a: Array) -> Array:
        new = (*shape[:at], a.shape[x.dim], *shape[at + 1 :])
        return jax.lax.broadcast_in_dim(a, new, dims)

    return x.each(lift(wider), at)


def _slice(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, p = args[0], eqn.params
    begin, end = list(p["start_indices"]), list(p["limit_indices"])
    if p["strides"] is not None and p["strides"][x.at] != 1:
        return NotImplemented
    y = x.cut(begin[x.at], end[x.at])
    if y is NotImplemented:
        return y

    def others(a: Array) -> Array:
        ends = [*end]
        begins = [*begin]
        begins[x.at], ends[x.at] = 0, a.shape[x.dim]
        return jax.lax.slice(a, begins, ends, p["strides"])

    return y.each(lift(others)) if isinstance(y, Pieces) else lift(others)(y)


def _split(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, sizes = args[0], eqn.params["sizes"]
    ends = np.cumsum((0, *sizes)).tolist()
    if eqn.params["axis"] == x.at:
        found = [x.cut(*pair) for pair in zip(ends, ends[1:], strict=False)]
        return NotImplemented if any(y is NotImplemented for y in found) else found
    one = lift(lambda a: jax.lax.split(a, sizes, eqn.params["axis"]))
    parts = [one(a) for a in x.arrays]
    return [Pieces(tuple(of), x.dim, x.path) for of in zip(*parts, strict=True)]


def _dot(eqn: JaxprEqn, args: list[Any]) -> Any:
    at = 1 if isinstance(args[1], Pieces) else 0
    other = args[1 - at]
    if isinstance(other, Leaf):
        return NotImplemented
    return args[at].products(other, dot_of(eqn, at))


def _conv(eqn: JaxprEqn, args: list[Any]) -> Any:
    x, kernel = args
    if isinstance(x, Leaf):
        return NotImplemented
    return kernel.convolutions(x, Conv(dict(eqn.params)))


_RULES: dict[str, Callable[[JaxprEqn, list[Any]], Any]] = {
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
