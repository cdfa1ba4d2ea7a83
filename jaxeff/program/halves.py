"""A function's forward and backward as programs of their own, to run them apart.

Between the two, a forward leaves behind what its backward needs (in a pipeline for many
steps). Of that, only what hangs on the data is kept: weights, and what is computed from
weights alone (as their cast to bfloat16), are there anyway. The backward can be cut
once more: first the gradient of the input, later that of the weights.

Source for the second cut: Qi et al. 2023, arXiv:2401.10241, section 2.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, JaxprEqn, Literal, Var
from jaxtyping import Array, PyTree

from .interpret import bind
from .walk import bodies, needed


@dataclasses.dataclass(frozen=True)
class Halves:
    """`fn(weights, x, given) -> y`, like x, cut into forward and backward.

    Attributes:
        kept: shape and dtype of all that `forward` leaves for the backward.
        handed: the same of what `of_input` leaves for `of_weights`, beside `kept`.
    """

    kept: tuple[jax.ShapeDtypeStruct, ...]
    handed: tuple[jax.ShapeDtypeStruct, ...]
    _forward: ClosedJaxpr
    _backward: ClosedJaxpr
    _stored: tuple[int, ...]  # which of the residuals are kept
    _place: tuple[int | None, ...]  # for each residual, its place in `kept`
    _of_input: tuple[JaxprEqn, ...]
    _of_weights: tuple[JaxprEqn, ...]
    _handed: tuple[Var, ...]
    _weights: Any  # the structure of the weights

    def forward(self, weights: PyTree, x: Array, given: PyTree) -> tuple[Array, list]:
        """`fn`, and what the backward will need."""
        flat = jax.tree.leaves((weights, x, given))
        y, *rest = jaxpr_as_fun(self._forward)(*flat)
        return y, [rest[i] for i in self._stored]

    def backward(
        self, weights: PyTree, kept: Sequence[Array], g: Array
    ) -> tuple[PyTree, Array]:
        """The gradients of the weights and of x, given that of the result."""
        *of_weights, of_x = jaxpr_as_fun(self._backward)(
            *self._residuals(weights, kept), g
        )
        return jax.tree.unflatten(self._weights, of_weights), of_x

    def of_input(
        self, weights: PyTree, kept: Sequence[Array], g: Array
    ) -> tuple[Array, list]:
        """The gradient of x alone, and what that of the weights will need."""
        values = self._start([*self._residuals(weights, kept), g])
        _run(self._of_input, values)
        of_x = _read(values, self._backward.jaxpr.outvars[-1])
        return of_x, [values[v] for v in self._handed]

    def of_weights(
        self, weights: PyTree, kept: Sequence[Array], handed: Sequence[Array]
    ) -> PyTree:
        """The gradients of the weights that `of_input` left out."""
        residuals = self._residuals(weights, kept)
        values = self._start(residuals)
        values.update(zip(self._handed, handed, strict=True))
        _run(self._of_weights, values)
        out = [_read(values, v) for v in self._backward.jaxpr.outvars[:-1]]
        return jax.tree.unflatten(self._weights, out)

    def _residuals(self, weights: PyTree, kept: Sequence[Array]) -> list[Any]:
        # The others don't hang on x, so it may be anything; what is computed from it is
        # not used, and the compiler leaves it out.
        flat = jax.tree.leaves(weights)
        data = [
            jnp.zeros(v.shape, v.dtype) for v in self._forward.in_avals[len(flat) :]
        ]
        again = jaxpr_as_fun(self._forward)(*flat, *data)[1:]
        return [
            again[i] if at is None else kept[at] for i, at in enumerate(self._place)
        ]

    def _start(self, args: Sequence[Any]) -> dict[Var, Any]:
        inner = self._backward.jaxpr
        values = dict(zip(inner.constvars, self._backward.consts, strict=True))
        # Without `g`, which `of_weights` gets only as far as it was handed on.
        values.update(zip(inner.invars, args, strict=False))
        return values


def halves(
    fn: Callable[[PyTree, Array, PyTree], Array], weights: PyTree, x: Any, given: PyTree
) -> Halves:
    """Cuts a function, given the shapes of its operands.

    Args:
        fn: `fn(weights, x, given) -> y`, with a result like x.
        weights: a pytree of arrays, or of their shapes.
        x: an array, or its shape.
        given: a pytree of arrays that need no gradient, or of their shapes.
    """
    flat, structure = jax.tree.flatten(weights)
    flat, x, given = jax.tree.map(_shape, (flat, x, given))
    found: list[Any] = []

    def forward(flat, x, given):
        call = lambda w, x: fn(jax.tree.unflatten(structure, w), x, given)
        y, back = jax.vjp(call, flat, x)
        residuals, tree = jax.tree.flatten(back)
        found.append(tree)
        return [y, *residuals]

    ahead = jax.make_jaxpr(forward)(flat, x, given)
    residuals = ahead.out_avals[1:]

    def backward(residuals, g):
        of_weights, of_x = jax.tree.unflatten(found[0], residuals)(g)
        return [*of_weights, of_x]

    back = jax.make_jaxpr(backward)(
        [_shape(r) for r in residuals], _shape(ahead.out_avals[0])
    )
    from_data = _reached(ahead, set(ahead.jaxpr.invars[len(flat) :]))
    stored, place, seen = [], [], {}
    for i, v in enumerate(ahead.jaxpr.outvars[1:]):
        if isinstance(v, Literal) or v not in from_data:
            place.append(None)
            continue
        if v not in seen:
            seen[v] = len(stored)
            stored.append(i)
        place.append(seen[v])
    back = _inlined(back)
    first, second, between = _cut(back, len(residuals))
    return Halves(
        tuple(_shape(residuals[i]) for i in stored),
        tuple(_shape(v.aval) for v in between),
        ahead,
        back,
        tuple(stored),
        tuple(place),
        first,
        second,
        between,
        structure,
    )


def _inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with its `jit`s opened: what is in one equation can't be cut."""

    def run(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        inner = program.jaxpr
        values = dict(zip(inner.constvars, program.consts, strict=True))
        values.update(zip(inner.invars, args, strict=True))
        for eqn in inner.eqns:
            given = [_read(values, v) for v in eqn.invars]
            inlined = eqn.primitive.name in ("jit", "closed_call")
            out = run(bodies(eqn)[0].jaxpr, given) if inlined else bind(eqn, given)
            values.update(zip(eqn.outvars, out, strict=True))
        return [_read(values, v) for v in inner.outvars]

    return jax.make_jaxpr(lambda *args: run(program, args))(
        *map(_shape, program.in_avals)
    )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _reached(program: ClosedJaxpr, start: set[Var]) -> set[Var]:
    """All that is computed from some variables."""
    reached = set(start)
    for eqn in program.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return reached


def _cut(
    back: ClosedJaxpr, residuals: int
) -> tuple[tuple[JaxprEqn, ...], tuple[JaxprEqn, ...], tuple[Var, ...]]:
    """The equations of the last output, those left for the others, what is between."""
    inner = back.jaxpr
    *others, _ = inner.outvars
    of = lambda last: [last] * len(others)
    ahead = [i for i, _ in needed(back, [*of(False), True])[0]]
    rest = [i for i, _ in needed(back, [*of(True), False])[0] if i not in {*ahead}]
    first, second = ([inner.eqns[i] for i in at] for at in (ahead, rest))
    there = {*inner.constvars, *inner.invars[:residuals]}
    there.update(v for e in second for v in e.outvars)
    wanted = [v for e in second for v in e.invars] + list(others)
    between = [
        v
        for v in dict.fromkeys(w for w in wanted if not isinstance(w, Literal))
        if v not in there
    ]
    return tuple(first), tuple(second), tuple(between)


def _run(eqns: Sequence[JaxprEqn], values: dict[Var, Any]) -> None:
    for eqn in eqns:
        out = bind(eqn, [_read(values, v) for v in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))


def _read(values: dict[Var, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else values[v]
