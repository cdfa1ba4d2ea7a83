"""Runs each product with a compressed weight in the form that is fastest here.

A weight in few bits can be decoded whole, decoded piece by piece, or multiplied as it
is stored, and which of these is fastest depends on the machine and on the number of
rows. `tune_products` measures each product of a function on the machine it runs on,
and keeps what was clearly faster than the form it has anyway.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from rich.console import Console
from rich.progress import Progress

from jaxeff.program import (
    Call,
    Dot,
    dot_of,
    is_leaf,
    Leaf,
    Lifted,
    Lifting,
    table,
    unlift,
    Where,
)

from .timing import measure_latency
from .tuning import CLEARLY

AS_IT_IS = "as it is"
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class TimedProduct:
    """One kind of product, and what was measured of it.

    Attributes:
        product: format and shape of the weight, shape of what it meets.
        count: how often it stands in the program.
        form: in which it runs.
        times: of each form its seconds, the lower quartile; `dense` is the product
            with the weight decoded beforehand, which takes the memory of a dense
            weight: no form, but what these compare with.
    """

    product: str
    count: int
    form: str
    times: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> dict[str, float]:
        """By form."""
        return dict(self.times)


@dataclasses.dataclass(frozen=True)
class FastProducts(Lifted):
    """A lifted function whose products run in chosen forms; see `tune_products`.

    Attributes:
        forms: of each kind of product that does not run as it is.
        measured: what was measured; empty for a model that was read from a file.
    """

    forms: tuple[tuple[str, str], ...] = ()
    measured: tuple[TimedProduct, ...] = ()

    def rule(self) -> Lifting:
        """Multiplies in these forms."""
        return _Choosing(dict(self.forms))

    def __str__(self) -> str:
        """A line for each kind of product that was measured, or has a form."""
        if not self.measured:
            return table(["product", "runs"], self.forms)
        head = ["product", "runs", "count", "us as it is", "us tuned", "us dense"]
        us = lambda m, form: f"{1e6 * m.seconds[form]:.0f}"
        rows = [
            [
                m.product,
                m.form,
                str(m.count),
                us(m, AS_IT_IS),
                us(m, m.form),
                us(m, DENSE),
            ]
            for m in self.measured
        ]
        return table(head, rows)

    def settings(self) -> dict[str, Any]:
        """The form of each product that has one."""
        return {"forms": dict(self.forms)}

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> "FastProducts":
        """`fn` with these forms."""
        return cls(fn, tuple(settings["forms"].items()))


def tune_products(
    fn: Callable,
    params: Any,
    *args: Any,
    repeats: int = 15,
    max_seconds: float | int = 2.0,
    progress: bool = True,
) -> FastProducts:
    """Measures every product with a compressed weight, and keeps the fastest form.

    Products that are alike are measured once, on the default device, their forms
    interleaved. Print the result to see what was chosen, and how long each takes.

    Law: the result computes what `lift(fn)` computes, to the rounding of sums, and so
    do its derivatives. A product with another number of rows runs as it is.

    Apply it last, and to a model on one device: the forms cut dims that may be
    sharded.

    Args:
        fn: `fn(params, *args)`.
        params, args: or their shapes. The batch should be the one that will run.
        repeats: timed calls of each form.
        max_seconds: no more rounds for one product after this long, once each of its
            forms was timed three times.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: no product with a compressed weight has another form.
    """
    own = unlift(fn)
    found = _Choosing({})
    call = Call(own, params, args, {})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call.inputs)
    jax.eval_shape(lambda xs: call.run(found, xs), shapes)
    if not found.products:
        raise ValueError(
            "tune_products looks for products with weights that can be multiplied in "
            "several ways (those of `quantize` in formats like `int8`, but not factors "
            "of a weight), and the function has none. Use it as it is."
        )
    measured = []
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("products", total=len(found.products))
        for name, (count, leaf, x, dot) in found.products.items():
            seconds = _measure(leaf, x, dot, repeats, max_seconds)
            ours = {form: s for form, s in seconds.items() if form != DENSE}
            best = min(ours, key=ours.__getitem__)
            if seconds[best] > CLEARLY * seconds[AS_IT_IS]:
                best = AS_IT_IS
            measured.append(TimedProduct(name, count, best, tuple(seconds.items())))
            bar.advance(task)
    forms = tuple((m.product, m.form) for m in measured if m.form != AS_IT_IS)
    return FastProducts(own, forms, tuple(measured))


def _measure(
    leaf: Any, x: Any, dot: Dot, repeats: int, max_seconds: float
) -> dict[str, float]:
    """Seconds of each form, and of the dense product: of lower quartiles."""
    ones = lambda s: jnp.ones(s.shape, s.dtype)
    leaf, x = jax.tree.map(ones, leaf), ones(x)

    def form(name: str) -> Callable:
        if name == AS_IT_IS:
            return lambda leaf, x: leaf.dot(x, dot)
        return lambda leaf, x: leaf.forms(x, dot)[name]()

    runs = {name: jax.jit(form(name)) for name in (AS_IT_IS, *leaf.forms(x, dot))}
    thunks = {n: functools.partial(run, leaf, x) for n, run in runs.items()}
    plain = jax.jit(lambda w, x: dot(x, w.astype(x.dtype)))
    thunks[DENSE] = functools.partial(plain, leaf.dense(), x)
    times = measure_latency(thunks, repeats=repeats, max_seconds=max_seconds)
    # What else runs on a machine only ever adds time.
    return {name: t.low for name, t in times.items()}


class _Choosing(Lifting):
    """Multiplies in the forms that were chosen; collects the products it meets."""

    def __init__(self, forms: Mapping[str, str]):
        super().__init__()
        self.forms = forms
        self.products: dict[str, tuple[int, Any, Any, Dot]] = {}

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        """A product in its form; all else as it is."""
        leaves = [i for i, x in enumerate(args) if is_leaf(x)]
        if eqn.primitive.name != "dot_general" or len(leaves) != 1:
            return super().equation(eqn, args, where)
        weight, dot = leaves[0], dot_of(eqn, leaves[0])
        leaf, x = args[weight], args[1 - weight]
        forms = leaf.forms(x, dot)
        if forms:
            name = _name(leaf, x, dot)
            count = self.products[name][0] if name in self.products else 0
            self.products[name] = (count + 1, *_shapes(leaf, x), dot)
            if self.forms.get(name) in forms:
                self.ran[where] = True
                return [forms[self.forms[name]]()]
        return super().equation(eqn, args, where)


def _shapes(leaf: Leaf, x: Any) -> tuple[Any, Any]:
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, leaf), shape(x)


def _name(leaf: Leaf, x: Any, dot: Dot) -> str:
    """What tells kinds of products apart."""
    d = dot.dims
    by = lambda x: "x".join(map(str, x.shape))
    name = getattr(leaf, "format", type(leaf).__name__)
    stored = ",".join(map(by, jax.tree.leaves(leaf)))
    dims = f"{d.x_contract}{d.w_contract}{d.x_batch}{d.w_batch}".replace(" ", "")
    side = "weight first" if dot.weight_first else ""
    said = [f"{x.dtype} {by(x)} by {name} {by(leaf)}", f"as {stored}", dims, side]
    return ", ".join(filter(None, said))
