"""Training with products in 8 bits, forward and backward.

`low_precision(fn)` runs the products of weights on codes of both factors: forward
those of activations and weights, backward those of gradients with either. Gradients
are rounded up or down by chance, so that their mean is right. Scales are those of the
arrays at hand ("current" scaling), so nothing is kept from step to step and gradient
accumulation needs no care. The weights and the optimizer stay in float32.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3 forward, e5m2 backward);
Banner et al. 2018, arXiv:1805.11046 (8-bit integers); Gupta et al. 2015,
arXiv:1502.02551, section 3 (rounding by chance).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Key

from jaxeff import tree
from jaxeff.program import Call, Interpreter, is_leaf, Program, Rewritten, Where

from . import blocks, scales as scaling
from .grids import Grid, named, neighbours
from .products import Kind

PRODUCTS = ("dot_general", "conv_general_dilated")
# Of what flows forward, and of gradients.
KINDS = {"int8": ("int8", "int8"), "fp8": ("e4m3", "e5m2")}
_ORDER = "Give it dense weights: train in 8 bits first, quantize afterwards."


@dataclasses.dataclass(frozen=True)
class LowPrecision(Rewritten):
    """A function with products of few bits; see `low_precision`."""

    forward: str
    backward: str
    weights: tuple[str, ...] = ("**",)

    def settings(self) -> dict[str, Any]:
        """The names of the formats, and the patterns."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "weights": list(self.weights),
        }

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> "LowPrecision":
        """`fn` with those settings."""
        s = settings
        return cls(fn, s["forward"], s["backward"], tuple(s["weights"]))

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn`, with the products of its weights in few bits."""
        call = Call(self.fn, params, args, kwargs, open_leaves=True)
        sites = [s for s in Program(call).sites if s.primitive in PRODUCTS]
        reasons = {s.path: "" for s in sites}
        for path, x in tree.paths(params, is_leaf).items():
            if is_leaf(x) and not any(p.startswith(f"{path}/") for p in reasons):
                form = getattr(x, "format", type(x).__name__)
                reasons[path] = f"it is compressed already ({form})"
        patterns = list(self.weights)
        chosen = set(tree.match(patterns, reasons, what="multiplied weight"))
        tree.check_some(patterns, reasons, does="runs in 8 bits", way_out=_ORDER)
        at = {s.where for s in sites if s.path in chosen}
        rule = _Rounding(at, named(self.forward), named(self.backward))
        outs = call.run(rule)
        if not rule.done:
            found = sorted({str(t) for t in rule.left}) or "none at all"
            raise ValueError(
                f"nothing runs in {self.forward}: of the {len(at)} products of weights "
                f"that are named, none is of two floating-point arrays (found: "
                f"{found}). Call the function without it."
            )
        return outs


def low_precision(
    fn: Callable, format: str = "int8", *, weights: tree.Patterns = "**"
) -> Callable:
    """Makes `fn(params, *args)` run the products of its weights in 8 bits.

    Apply it before `jax.grad`, whose products are in 8 bits then too.

    Args:
        fn: any function.
        format: "int8", or "fp8": e4m3 forward and e5m2 for gradients.
        weights: patterns of those whose products are; others, and products of two
            activations, stay as they are.

    Raises:
        ValueError: the format is neither; or, when called, a pattern matches no weight
            that is multiplied, or only ones that are decoded or rounded first, as
            those of `fake_quantize`; or there is no such product.
    """
    if format not in KINDS:
        raise ValueError(
            f"products run in one of {', '.join(KINDS)}, got {format!r}. For 16 bits "
            "see `jaxeff.precision.autocast`."
        )
    patterns = (weights,) if isinstance(weights, str) else tuple(weights)
    return LowPrecision(fn, *KINDS[format], patterns)


class _Rounding(Interpreter):
    """Runs chosen products on codes."""

    def __init__(self, at: set[Where], forward: Grid, backward: Grid):
        super().__init__()
        self.at, self.forward, self.backward = at, forward, backward
        self.done = 0
        self.left: list[Any] = []

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        if where not in self.at:
            return None
        if any(0 in v.aval.shape for v in (*eqn.invars, *eqn.outvars)):
            self.done += 1  # of an empty batch: there is nothing to round
            return None
        types = [v.aval.dtype for v in eqn.invars]
        if not all(jnp.issubdtype(t, jnp.floating) for t in types):
            self.left.append(types)
            return None
        self.done += 1
        return [_product(eqn, self.forward, self.backward)(*args)]


def _product(eqn: JaxprEqn, forward: Grid, backward: Grid) -> Callable:
    """The product of an equation, on codes, with its gradients on codes."""
    wide = {**eqn.params, "precision": None, "preferred_element_type": jnp.float32}
    plain = lambda a, b: eqn.primitive.bind(a, b, **wide)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    out = eqn.outvars[0].aval.dtype
    run = lambda a, b: _on_codes(plain, (a, b), (forward, forward), None).astype(out)
    fn = jax.custom_vjp(run)

    def ahead(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
        return fn(a, b), (a, b)

    def back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        a, b = kept
        grids, key = (backward, forward), _key(g)
        of_a = lambda g, b: jax.linear_transpose(lambda a: plain(a, b), like(a))(g)[0]
        of_b = lambda g, a: jax.linear_transpose(lambda b: plain(a, b), like(b))(g)[0]
        da = _on_codes(of_a, (g, b), grids, jr.fold_in(key, 0))
        db = _on_codes(of_b, (g, a), grids, jr.fold_in(key, 1))
        return da.astype(a.dtype), db.astype(b.dtype)

    fn.defvjp(ahead, back)
    return fn


def _on_codes(
    fn: Callable,
    args: tuple[Array, Array],
    grids: tuple[Grid, Grid],
    key: Key[Array, ""] | None,
) -> Float[Array, "..."]:
    """A function made of one product and changes of place, run on codes; float32.

    Each factor has one scale, so the result has their product. With a key the first is
    rounded by chance.
    """
    first, a = _codes(args[0], grids[0], key)
    second, b = _codes(args[1], grids[1], None)
    jaxpr = jax.make_jaxpr(fn)(*(jnp.zeros(x.shape, jnp.float32) for x in args))
    y = _Codes(Kind(grids[1], grids[0])).run(jaxpr, [first, second])[0]
    return y.astype(jnp.float32) * (a * b)


def _longest_sum(eqn: JaxprEqn) -> int:
    """How many products an output of a product sums."""
    left, right = (v.aval.shape for v in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return math.prod(left[d] for d in numbers[0][0])
    return math.prod(right) // right[numbers.rhs_spec[0]]


class _Codes(Interpreter):
    """Runs products on codes, summed in a wider dtype."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.kind = kind

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        if eqn.primitive.name not in PRODUCTS:
            return None
        sums = self.kind.sums_codes(_longest_sum(eqn))
        if sums is None:  # 32 bits could overflow
            args, sums = [x.astype(jnp.float32) for x in args], jnp.float32
        # Convolutions take factors of one dtype; bfloat16 holds every float of 8 bits.
        if eqn.primitive.name != "dot_general" and args[0].dtype != args[1].dtype:
            args = [x.astype(jnp.bfloat16) for x in args]
        params = {**eqn.params, "precision": None, "preferred_element_type": sums}
        return [eqn.primitive.bind(*args, **params)]


def _codes(
    x: Float[Array, "..."], grid: Grid, key: Key[Array, ""] | None
) -> tuple[Array, Float[Array, ""]]:
    """The codes of an array under one scale, rounded by chance if there is a key."""
    scale = scaling.step(blocks.absmax(x, x.shape), grid.largest)
    units = x.astype(jnp.float32) / scale
    if key is not None:
        low, high = neighbours(units, grid)
        part = (units - low) / (high - low)
        units = jnp.where(jr.uniform(key, x.shape) < part, high, low)
    return grid.encode(units), scale.reshape(())


def _key(g: Array) -> Key[Array, ""]:
    """A key that follows from the gradient, so that no two steps have the same."""
    bits = jax.lax.bitcast_convert_type(jnp.sum(g.astype(jnp.float32)), jnp.uint32)
    return jr.fold_in(jr.key(0), bits)
