"""Runs a traced program again, each equation in the dtype that the rules say.

Weights and numbers are handed around so that they take the dtype of what they meet
(`values.py`). An array that is cast is cast once for all its uses in a body, and one
that enters a loop is cast before it: what a loop wants is found by running a turn of
it on shapes, until the dtypes of its carry no longer change.
"""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from jaxeff.program import bind, bodies, Interpreter, is_inexact, rebuilt, Where

from .rules import (
    EACH,
    ELEMENTWISE,
    is_float32,
    is_product,
    keeps,
    MULTIPLY,
    PRODUCTS,
    VIEWS,
    wanted,
    widens,
)
from .values import (
    array_of,
    Held,
    is_wide,
    is_written,
    mark,
    Number,
    number,
    shared,
    yields,
)


@dataclasses.dataclass
class _Scope:
    """One run of one body: what it wants in float32, and the casts it has made."""

    wanted: frozenset[Var]
    casts: dict[tuple[int, Any], tuple[Any, Any]]


class Recast(Interpreter):
    """Runs a program again, each equation in the dtype that the rules say."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.dtype = dtype
        self.products: Counter = Counter()  # how many ran in which dtype
        self._scopes: dict[Where, _Scope] = {}
        # Known before a body runs; it may run later, when JAX differentiates it.
        self._outs: dict[Where, tuple[bool, ...]] = {}  # outputs wanted in float32
        self._weights: dict[Where, Sequence[bool]] = {}  # inputs that yield
        self._loops = itertools.count()
        self._asked: set[tuple[tuple[int, int], str]] = set()
        self._cast: dict[tuple[int, Any], tuple[Any, Any]] = {}

    def start(
        self,
        jaxpr: ClosedJaxpr,
        args: Sequence[Any],
        weights: Sequence[bool],
        wide: Sequence[bool],
    ) -> list[Any]:
        """The outputs of a whole program.

        Args:
            jaxpr: the program.
            args: its inputs.
            weights: which inputs are weights.
            wide: which outputs will be used in float32.
        """
        self._weights[()], self._outs[()] = weights, tuple(wide)
        args = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in args]
        return [self.plain(y) for y in self.run(jaxpr, args)]

    def keeps_types(self, eqn: JaxprEqn, args: list[Any], where: Where) -> bool:
        """Never: the rule of a custom derivative is re-run in the same dtypes."""
        return False

    # Values.

    def low(self, x: Any) -> Any:
        """`x` in the low dtype."""
        if (n := number(x)) is not None:
            return n.array(self.dtype)
        if not isinstance(x, Held):
            return self._as(x, self.dtype)
        if x.origin is not None:
            self._asked.add((x.origin, "low"))
        if x.low is None:
            return self._as(x.wide, self.dtype)
        if x.wide is None:
            return x.low
        return self._once(x.low, "shared", lambda: shared(x.wide, x.low))

    def wide(self, x: Any) -> Any:
        """`x` in float32."""
        if isinstance(x, Number):
            return x.array(_F32)
        if not isinstance(x, Held):
            return x if is_written(x) else self._as(x, _F32)
        if x.origin is not None:
            self._asked.add((x.origin, "wide"))
        assert x.wide is not None, "a loop is entered with all that it asks for"
        return x.wide

    def plain(self, x: Any) -> Any:
        """`x` as an array, in the dtype it was traced with or has been given."""
        return self.wide(x) if isinstance(x, Held | Number) else x

    def _as(self, x: Any, dtype: Any) -> Any:
        if x.dtype == dtype:
            return x
        return self._once(x, dtype, lambda: jax.lax.convert_element_type(x, dtype))

    def _once(self, x: Any, what: Any, make: Callable[[], Any]) -> Any:
        # One cast for all uses in a body: it is also what `grad` saves.
        if (id(x), what) not in self._cast:
            self._cast[id(x), what] = (x, make())  # holding x keeps its id its own
        return self._cast[id(x), what][1]

    # Bodies.

    def run(self, jaxpr: ClosedJaxpr, args: Sequence[Any], where: Where = ()) -> list:
        """Runs a body in a trace of its own, so with casts of its own."""
        return self._run(jaxpr, args, where, {})

    def _run(self, jaxpr, args, where, casts):
        outs = self._outs.get(where, (False,) * len(jaxpr.jaxpr.outvars))
        scope = _Scope(wanted(jaxpr.jaxpr, outs), casts)
        weights = itertools.chain(self._weights.get(where, ()), itertools.repeat(False))
        args = [
            Held(x, yields=True) if w and not isinstance(x, Held) and is_wide(x) else x
            for x, w in zip(args, weights, strict=False)
        ]
        with self._inside(where, scope):
            return super().run(jaxpr, args, where)

    @contextlib.contextmanager
    def _inside(self, where: Where, scope: _Scope) -> Iterator[None]:
        before, cast = self._scopes.get(where), self._cast
        self._scopes[where], self._cast = scope, scope.casts
        try:
            yield
        finally:
            self._cast = cast
            if before is None:
                del self._scopes[where]
            else:
                self._scopes[where] = before

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        """Runs an equation in the dtypes of the rules."""
        name, scope = eqn.primitive.name, self._scopes[where[:-1]]
        if rebuilt(name):
            self._announce(eqn, args, where, scope)
            if name in ("jit", "closed_call", "core_call"):  # in the same trace
                (body,) = bodies(eqn, where)
                return self._run(body.jaxpr, args, body.where, scope.casts)
            return None
        if name in VIEWS and (isinstance(args[0], Held) or number(args[0])):
            return self._view(eqn, args)
        if name == "convert_element_type":
            return [self._convert(eqn, args[0])]
        return self._ordinary(eqn, args, scope)

    def _announce(self, eqn, args, where, scope):
        """Notes what the bodies of an equation will need to know when they run."""
        name = eqn.primitive.name
        if name in ("scan", "while"):
            return
        want = tuple(v in scope.wanted for v in eqn.outvars)
        for body in bodies(eqn, where):
            self._outs[body.where] = want
        if name == "shard_map" or name.startswith("custom_"):  # take plain arrays
            tangents = [False for v in eqn.outvars if is_inexact(v)]
            self._outs[(*where, "jvp")] = (*want, *tangents)
            for inner in (0, "jvp", "vjp"):
                self._weights[(*where, inner)] = [yields(x) for x in args]

    def loop(self, turn, consts, carry, xs):
        """A carry of the widest dtypes it meets, and operands cast before the loop."""
        if self.dtype == jnp.float32:
            return consts, carry, xs
        me, n = next(self._loops), len(consts)
        given = [*consts, *(self.plain(x) if isinstance(x, Number) else x for x in xs)]
        marked = [mark(x, (me, i)) for i, x in enumerate(given)]
        while True:
            self._asked = {a for a in self._asked if a[0][0] != me}
            types = [y.dtype for y in turn(marked[:n], carry, marked[n:])]
            new = [self._wider(x, t) for x, t in zip(carry, types, strict=True)]
            if all(x is y for x, y in zip(carry, new, strict=True)):
                break
            carry = new
        given = [
            self._enter(x, m, shared=i < n)
            for i, (x, m) in enumerate(zip(given, marked, strict=True))
        ]
        return given[:n], carry, given[n:]

    def _wider(self, x: Any, dtype: Any) -> Any:
        if x.dtype == dtype:
            return x
        return self._as(x, jnp.promote_types(x.dtype, dtype))

    def _enter(self, x: Any, marked: Any, shared: bool) -> Any:
        """An operand of a loop in the dtypes that the loop asked for."""
        if marked is x:
            return x
        asked = {what for origin, what in self._asked if origin == marked.origin}
        low = self.low(x) if "low" in asked else None
        if low is not None and shared:
            # All turns share it, so its gradient is a sum over turns: in float32.
            return Held(self.wide(x), jax.lax.stop_gradient(low), marked.yields)
        return Held(self.wide(x) if "wide" in asked else None, low, marked.yields)

    # Equations.

    def _view(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        """A view of a weight is that weight, and of a number that number."""
        x, rest = args[0], args[1:]
        n = number(x)
        if n is not None and eqn.primitive.name not in ("pvary", "pcast"):
            return [Number(n.value, tuple(v.aval.shape)) for v in eqn.outvars]
        if n is not None:
            return [Held(y, yields=True) for y in bind(eqn, [self.wide(x), *rest])]
        none = [None] * len(eqn.outvars)
        wide = none if x.wide is None else bind(eqn, [x.wide, *rest])
        low = none if x.low is None else bind(eqn, [x.low, *rest])
        return [Held(w, h, x.yields, x.origin) for w, h in zip(wide, low, strict=True)]

    def _convert(self, eqn: JaxprEqn, x: Any) -> Any:
        new = eqn.params["new_dtype"]
        if not is_float32(eqn.invars[0]):
            if is_written(x) and new == jnp.float32:
                return Number(float(x), ())
            return bind(eqn, [x])[0]
        if new == jnp.float32:  # only its weak type changes
            return x
        return self.low(x) if new == self.dtype else bind(eqn, [self.plain(x)])[0]

    def _ordinary(self, eqn: JaxprEqn, args: list[Any], scope: _Scope) -> list[Any]:
        if eqn.primitive.name in EACH:
            return bind(eqn, [self.plain(x) for x in args])
        floats = list(map(is_float32, eqn.invars))
        xs = [x for x, f in zip(args, floats, strict=True) if f]
        dtype = self._dtype(eqn, xs, scope)
        if dtype == _F32 or self._mixes(eqn, xs):
            outs = self._in_float32(eqn, args, floats, dtype)
        else:
            low = [self.low(x) if f else x for x, f in zip(args, floats, strict=True)]
            outs = bind(_accumulating(eqn, dtype), low)
        if eqn.primitive.name in PRODUCTS:
            # By its operands: in which dtype it accumulates is another matter.
            given = jnp.result_type(*(v.aval.dtype for v in eqn.invars))
            self.products[self.dtype if is_product(eqn) else given] += 1
        if args and all(map(yields, args)):
            outs = [Held(y, yields=True) if is_wide(y) else y for y in outs]
        return outs

    def _dtype(self, eqn: JaxprEqn, xs: list[Any], scope: _Scope) -> Any:
        """The dtype of an equation's result, given its float operands."""
        name = eqn.primitive.name
        if is_product(eqn):
            return self.dtype
        wanted = widens(eqn) and scope.wanted.intersection(eqn.outvars)
        reciprocal = name == "div" and number(xs[0]) is not None
        if wanted or reciprocal or not keeps(eqn):
            return _F32
        data = [x for x in xs if not yields(x)]
        if name in ELEMENTWISE:
            whole = eqn.outvars[0].aval.shape
            data = [x for x in data if array_of(x).shape == whole] or data
        numbers = filter(None, map(number, xs))
        if name not in MULTIPLY and not all(n.fits(self.dtype) for n in numbers):
            return _F32
        return self.dtype if data and not any(map(is_wide, data)) else _F32

    def _mixes(self, eqn: JaxprEqn, xs: list[Any]) -> bool:
        """Whether an operand must not be rounded, though the result will be.

        A mean or a bias is one number for many elements: rounding it would be one
        error in all of them, and its gradient is a sum over them.
        """
        if eqn.primitive.name not in ELEMENTWISE:
            return False
        whole = eqn.outvars[0].aval.shape
        exact = [n.exact(self.dtype) for x in xs if (n := number(x)) is not None]
        arrays = [x for x in xs if number(x) is None]
        small = [x for x in arrays if array_of(x).shape != whole]
        return not all(exact) or any(map(is_wide, small))

    def _in_float32(self, eqn, args, floats, dtype):
        """An equation run in float32, with its result in `dtype`."""
        xs = [x for x, f in zip(args, floats, strict=True) if f]
        numbers = any(number(x) is not None for x in xs)
        rounded = not all(is_written(x) or is_wide(x) for x in xs)
        saves = eqn.primitive.name in MULTIPLY and rounded and not numbers
        # What `grad` would save in float32 it makes again from what is rounded.
        get = self.plain if saves else self.wide
        operands = [get(x) if f else x for x, f in zip(args, floats, strict=True)]

        def run(*operands):
            up = [
                _cast(x, _F32) if f else x
                for x, f in zip(operands, floats, strict=True)
            ]
            return [_cast(y, dtype) if is_wide(y) else y for y in bind(eqn, up)]

        run = jax.checkpoint(run, prevent_cse=False) if saves else run
        return run(*operands)


_F32 = jnp.dtype(jnp.float32)


def _cast(x: Any, dtype: Any) -> Any:
    same = is_written(x) or x.dtype == dtype
    return x if same else jax.lax.convert_element_type(x, dtype)


def _accumulating(eqn: JaxprEqn, dtype: Any) -> JaxprEqn:
    """The equation with its result, if a product's, in `dtype`."""
    if not is_product(eqn) or eqn.params["preferred_element_type"] != _F32:
        return eqn
    return eqn.replace(params={**eqn.params, "preferred_element_type": dtype})
