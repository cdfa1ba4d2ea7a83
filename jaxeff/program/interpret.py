"""The one interpreter: runs a traced program again, equation by equation.

A technique subclasses `Interpreter` and says what happens at an equation;
everything else is run as it stood. Primitives that hold a program of their
own (`jit`, `scan`, `while`, `cond`, `remat`, `custom_jvp_call`,
`custom_vjp_call`, `shard_map`) are opened and rebuilt around the result, so a
rule written for `dot_general` also acts inside a scanned, rematerialised block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from .walk import bodies, scan_counts, Where


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Runs one equation as it stands on new operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def is_inexact(v: Any) -> bool:
    """Whether a variable holds floating-point or complex numbers."""
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


@functools.lru_cache(maxsize=256)
def _jvp_program(eqn: JaxprEqn) -> ClosedJaxpr:
    """(operands, tangents of the inexact ones) -> (outputs, tangents) as a program."""
    floats = [i for i, v in enumerate(eqn.invars) if is_inexact(v)]
    outs = [i for i, v in enumerate(eqn.outvars) if is_inexact(v)]

    def jvp(primals, tangents):
        def run(*inexact):
            full = list(primals)
            for i, x in zip(floats, inexact, strict=True):
                full[i] = x
            return bind(eqn, full)

        primals_out, tangents_out = jax.jvp(run, [primals[i] for i in floats], tangents)
        return primals_out, [tangents_out[i] for i in outs]

    shapes = [_shape(v) for v in eqn.invars]
    return jax.make_jaxpr(jvp)(shapes, [shapes[i] for i in floats])


@functools.lru_cache(maxsize=256)
def _vjp_program(eqn: JaxprEqn) -> ClosedJaxpr:
    """(operands, cotangents of inexact outputs) -> cotangents of inexact operands."""
    floats = [i for i, v in enumerate(eqn.invars) if is_inexact(v)]
    outs = [i for i, v in enumerate(eqn.outvars) if is_inexact(v)]

    def vjp(primals, cotangents):
        def run(*inexact):
            full = list(primals)
            for i, x in zip(floats, inexact, strict=True):
                full[i] = x
            out = bind(eqn, full)
            return [out[i] for i in outs]

        return jax.vjp(run, *(primals[i] for i in floats))[1](cotangents)

    shapes = [_shape(v) for v in eqn.invars]
    return jax.make_jaxpr(vjp)(shapes, [_shape(eqn.outvars[i]) for i in outs])


class Interpreter:
    """Runs a program again; subclasses change what happens on the way.

    Values may be anything a subclass's own rules understand; before an
    ordinary equation sees them, `plain` makes them arrays. A value that enters
    a `scan` or `cond` must be a pytree.

    Law: `Interpreter().run(jaxpr, args)` equals the function that was traced,
    under `jit`, `grad` and `vmap`, bit for bit.
    """

    def __init__(self) -> None:
        # What `emit` collects in the body being run, by name.
        self._emitted: dict[str, Any] = {}

    # What a technique overrides.

    def equation(
        self, eqn: JaxprEqn, args: list[Any], where: Where
    ) -> Sequence[Any] | None:
        """The outputs of an equation, or None to run it as it stands."""
        return None

    def plain(self, x: Any) -> Any:
        """The array that stands for `x` where an ordinary primitive needs one."""
        return x

    def opens(self, eqn: JaxprEqn, args: list[Any]) -> bool:
        """Whether to open an equation that holds a program; else it runs whole."""
        return True

    def keeps_types(self, eqn: JaxprEqn, args: list[Any], where: Where) -> bool:
        """Whether an equation's operands and results are as they were traced.

        Then a `custom_jvp` or `custom_vjp` function runs whole, with its own rule.
        Otherwise it is rebuilt, and its rule is re-run in the same way.
        """
        return True

    # What a technique calls.

    def emit(self, name: str, value: Any) -> None:
        """Hands a value out beside the outputs, from however deep inside.

        From inside a `scan` it arrives stacked along a new dim 0; from a branch
        of a `cond` that was not taken it arrives as zeros.
        """
        self._emitted[name] = value

    def run(self, jaxpr: ClosedJaxpr, args: Sequence[Any], where: Where = ()) -> list:
        """Runs a program on `args`, one for each of its inputs."""
        env: dict[Var, Any] = {}
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env.update(zip(jaxpr.jaxpr.invars, args, strict=True))
        last_use = _last_uses(jaxpr.jaxpr)
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            outs = self.step(eqn, [read(v) for v in eqn.invars], (*where, i))
            env.update(zip(eqn.outvars, outs, strict=True))
            for v in last_use[i]:
                env.pop(v, None)
        outs = jaxpr.jaxpr.outvars
        return [
            jnp.asarray(read(v)) if isinstance(v, Literal) else env[v] for v in outs
        ]

    def collect(
        self, jaxpr: ClosedJaxpr, args: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The outputs of a program, and what was emitted on the way."""
        return self._collecting(lambda *xs: self.run(jaxpr, xs))(*args)

    def step(self, eqn: JaxprEqn, args: list[Any], where: Where) -> Sequence[Any]:
        """One equation: by its own rule, else rebuilt, else as it stands."""
        outs = self.equation(eqn, args, where)
        if outs is not None:
            return outs
        rebuild = _REBUILD.get(eqn.primitive.name)
        if rebuild is not None and self.opens(eqn, args):
            return rebuild(self, eqn, args, where)
        return bind(eqn, [self.plain(x) for x in args])

    def _collecting(self, fn: Callable) -> Callable:
        """`fn` with what it emits as a second output."""

        def run(*args):
            outer, self._emitted = self._emitted, {}
            try:
                return fn(*args), self._emitted
            finally:
                self._emitted = outer

        return run

    # How each primitive that holds a program is rebuilt.

    def inline(self, eqn: JaxprEqn, args: Sequence[Any], where: Where) -> list[Any]:
        """Runs the body of a call in place; a custom derivative rule is lost."""
        body = bodies(eqn, where)[0]
        return self.run(body.jaxpr, args, body.where)

    def _remat(self, eqn, args, where):
        body = bodies(eqn, where)[0]
        run = self._collecting(lambda *xs: self.run(body.jaxpr, xs, body.where))
        params = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
        outs, emitted = jax.checkpoint(run, **params)(*args)
        self._emitted.update(emitted)
        return outs

    def _scan(self, eqn, args, where):
        body = bodies(eqn, where)[0]
        n, m = scan_counts(eqn)
        consts = args[:n]
        carry, xs = [self.plain(x) for x in args[n : n + m]], args[n + m :]

        def step(consts, carry, xs):
            run = self._collecting(
                lambda *a: [self.plain(y) for y in self.run(body.jaxpr, a, body.where)]
            )
            outs, emitted = run(*consts, *carry, *xs)
            return outs[:m], (outs[m:], emitted)

        def turn(consts, carry, xs):
            return jax.eval_shape(lambda *a: step(consts, *a)[0], carry, _first(xs))

        consts, carry, xs = self.loop(turn, consts, carry, xs)

        def scanned(carry, xs):
            new, out = step(consts, carry, xs)
            return _like(new, carry), out

        params = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        carry, (ys, emitted) = jax.lax.scan(scanned, carry, xs, **params)
        self._emitted.update(emitted)
        return [*carry, *ys]

    def _while(self, eqn, args, where):
        test, body = bodies(eqn, where)
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = [self.plain(x) for x in args[n + m :]]

        # What is emitted in a loop has no place to go: the number of turns is
        # unknown, so there is no array to stack it in.
        def go_on(consts, carry):
            run = self._collecting(
                lambda: self.run(test.jaxpr, [*consts[:n], *carry], test.where)
            )
            return self.plain(run()[0][0])

        def step(consts, carry):
            run = self._collecting(
                lambda: self.run(body.jaxpr, [*consts[n:], *carry], body.where)
            )
            return [self.plain(y) for y in run()[0]]

        def turn(consts, carry, xs):
            both = lambda carry: (go_on(consts, carry), step(consts, carry))[1]
            return jax.eval_shape(both, carry)

        consts, carry, _ = self.loop(turn, args[: n + m], carry, [])
        return jax.lax.while_loop(
            lambda carry: go_on(consts, carry),
            lambda carry: _like(step(consts, carry), carry),
            carry,
        )

    def loop(
        self, turn: Callable, consts: list[Any], carry: list[Any], xs: list[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """A loop's operands, made to fit what a turn of the loop makes of them.

        `turn(consts, carry, xs)` gives the shapes of the next carry; each turn's
        carry is cast to the dtypes of the first.
        """
        return consts, carry, xs

    def _cond(self, eqn, args, where):
        index, operands = self.plain(args[0]), args[1:]

        def branch(body):
            def run(*xs):
                return [self.plain(y) for y in self.run(body.jaxpr, xs, body.where)]

            return self._collecting(run)

        branches = [branch(body) for body in bodies(eqn, where)]
        shapes = [jax.eval_shape(b, *operands) for b in branches]
        every = {k: s for _, emitted in shapes for k, s in emitted.items()}
        types = [
            _common_type(ys) for ys in zip(*(outs for outs, _ in shapes), strict=True)
        ]

        def same_outputs(b):
            def run(*xs):
                outs, emitted = b(*xs)
                missing = {k: s for k, s in every.items() if k not in emitted}
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), missing)
                outs = [_as_type(y, t) for y, t in zip(outs, types, strict=True)]
                return outs, {**emitted, **zeros}

            return run

        outs, emitted = jax.lax.switch(
            index, [same_outputs(b) for b in branches], *operands
        )
        self._emitted.update(emitted)
        return outs

    def _shard_map(self, eqn, args, where):
        body = bodies(eqn, where)[0]
        names = ("mesh", "in_specs", "out_specs", "check_vma")
        params = {k: eqn.params[k] for k in names}
        params["axis_names"] = set(eqn.params["newly_manual_axes"])

        def run(*xs):
            # Each device would emit its own; there is no spec to say how they join.
            inner = self._collecting(lambda: self.run(body.jaxpr, xs, body.where))
            return tuple(self.plain(y) for y in inner()[0])

        params["in_specs"] = tuple(params["in_specs"])
        params["out_specs"] = tuple(params["out_specs"])
        plain = [self.plain(x) for x in args]
        return list(jax.shard_map(run, **params)(*plain))

    def _custom_jvp(self, eqn, args, where):
        args = [self.plain(x) for x in args]
        if self.keeps_types(eqn, args, where):
            return bind(eqn, args)
        body = bodies(eqn, where)[0]
        inexact = [is_inexact(v) for v in eqn.invars]

        def run(*xs):
            return tuple(map(self.plain, self.run(body.jaxpr, xs, body.where)))

        fn = jax.custom_jvp(run)

        @fn.defjvp
        def jvp(primals, tangents):
            rule = _jvp_program(eqn)
            tangents = [t for t, f in zip(tangents, inexact, strict=True) if f]
            outs = self.run(rule, [*primals, *tangents], (*where, "jvp"))
            outs = [self.plain(y) for y in outs]
            outs, given = outs[: len(eqn.outvars)], iter(outs[len(eqn.outvars) :])
            outs = _like(outs, jax.eval_shape(run, *primals))
            tangents = [
                next(given) if is_inexact(v) else np.zeros(y.shape, jax.dtypes.float0)
                for v, y in zip(eqn.outvars, outs, strict=True)
            ]
            tangents = [
                _as_type(t, y.dtype) if is_inexact(v) else t
                for v, t, y in zip(eqn.outvars, tangents, outs, strict=True)
            ]
            return tuple(outs), tuple(tangents)

        return list(fn(*args))

    def _custom_vjp(self, eqn, args, where):
        args = [self.plain(x) for x in args]
        if self.keeps_types(eqn, args, where):
            return bind(eqn, args)
        body = bodies(eqn, where)[0]
        fn = jax.custom_vjp(
            lambda *xs: tuple(map(self.plain, self.run(body.jaxpr, xs, body.where)))
        )

        def forward(*xs):
            return fn(*xs), xs

        def backward(xs, cotangents):
            # The rule is re-run from the operands: its residuals are its own.
            given = [
                c for v, c in zip(eqn.outvars, cotangents, strict=True) if is_inexact(v)
            ]
            outs = self.run(_vjp_program(eqn), [*xs, *given], (*where, "vjp"))
            outs = iter([self.plain(y) for y in outs])
            return tuple(
                _as_type(next(outs), x.dtype) if is_inexact(v) else None
                for v, x in zip(eqn.invars, xs, strict=True)
            )

        fn.defvjp(forward, backward)
        return list(fn(*args))


def _first(xs: list[Any]) -> list[Any]:
    """The shapes of one slice along dim 0."""
    cut = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.tree.map(cut, xs)


def _common_type(xs: Sequence[Any]) -> Any:
    same = all(x.dtype == xs[0].dtype for x in xs)  # keys have no common type
    return xs[0].dtype if same else jnp.result_type(*xs)


def _like(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """Values in the dtypes of others."""
    return [_as_type(x, y.dtype) for x, y in zip(new, old, strict=True)]


def _as_type(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else jax.lax.convert_element_type(x, dtype)


def _last_uses(jaxpr: Jaxpr) -> list[list[Var]]:
    """For each equation the variables no later one reads, so memory can go."""
    seen = {v for v in jaxpr.outvars if isinstance(v, Var)}
    out: list[list[Var]] = []
    for eqn in reversed(jaxpr.eqns):
        here = {v for v in eqn.invars if isinstance(v, Var)} - seen
        seen |= here
        out.append(list(here))
    return out[::-1]


_REBUILD = {
    "jit": Interpreter.inline,
    "closed_call": Interpreter.inline,
    "remat2": Interpreter._remat,
    "checkpoint": Interpreter._remat,
    "custom_jvp_call": Interpreter._custom_jvp,
    "custom_vjp_call": Interpreter._custom_vjp,
    "scan": Interpreter._scan,
    "while": Interpreter._while,
    "cond": Interpreter._cond,
    "shard_map": Interpreter._shard_map,
}


def rebuilt(name: str) -> bool:
    """Whether a primitive of that name is opened and rebuilt."""
    return name in _REBUILD
