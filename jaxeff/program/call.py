"""A function traced on given operands, ready to be run again by an interpreter."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax

from jaxeff import tree

from .interpret import Interpreter
from .leaf import is_leaf, shapes


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A function that runs another one in its own way; the base of all rewrites.

    Attributes:
        fn: the other one.
    """

    kinds: ClassVar[dict[str, type["Rewritten"]]] = {}  # by name, for checkpoints

    fn: Callable

    def __init_subclass__(cls) -> None:
        """Makes the kind known by its name."""
        Rewritten.kinds[f"{cls.__module__}.{cls.__name__}"] = cls

    def around(self, fn: Callable) -> Any:
        """The same rewrite of another function."""
        return dataclasses.replace(self, fn=fn)

    def settings(self) -> dict[str, Any]:
        """What `restored` needs to rewrite another function likewise, as JSON.

        Raises:
            ValueError: this kind of rewrite has no description.
        """
        raise ValueError(
            f"a file cannot describe a function rewritten by {type(self).__name__}: "
            "save the function that it was made of, its attribute `fn`."
        )

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> Any:
        """The rewrite of `fn` that has these settings."""
        return cls(fn, **settings)


def inner(fn: Callable) -> Callable | None:
    """What a rewritten function was made of; None for one that is a model's own.

    A function is seen through `jax.jit` and where only keywords of it are given.
    """
    if isinstance(fn, Rewritten):
        return fn.fn
    if isinstance(fn, functools.partial) and not fn.args:
        return fn.func
    return getattr(fn, "__wrapped__", None)


class Call:
    """The trace of `fn(params, *args, **kwargs)` on dense shapes.

    What is neither an array nor a compressed weight (a flag, a function) is a
    constant of the trace, as it would be for `fn` itself.

    Attributes:
        fn: the function.
        params: its weights, as they were given.
        inputs: the arrays and leaves among the operands, in JAX's order.
        weights: for each input its path in `params`, or None for data.
        jaxpr: the program on `inputs`, each as its dense shape.
    """

    def __init__(
        self,
        fn: Callable,
        params: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        open_leaves: bool = False,
    ):
        """Traces `fn`, with the arrays of its leaves as inputs if `open_leaves`."""
        is_one = (lambda x: False) if open_leaves else is_leaf
        operands = (params, tuple(args), dict(kwargs))
        values, treedef = jax.tree.flatten(operands, is_leaf=is_one)
        names = list(tree.paths(params, is_one))
        names += [None] * (len(values) - len(names))
        dynamic = [i for i, x in enumerate(values) if is_one(x) or tree.is_array(x)]

        def traced(*xs):
            filled = list(values)
            for i, x in zip(dynamic, xs, strict=True):
                filled[i] = x
            params, args, kwargs = jax.tree.unflatten(treedef, filled)
            return fn(params, *args, **kwargs)

        self.fn, self.params = fn, params
        self.inputs = [values[i] for i in dynamic]
        self.weights = [names[i] for i in dynamic]
        make = jax.make_jaxpr(traced, return_shape=True)
        self.jaxpr, out = make(*map(shapes, self.inputs))
        self._out = jax.tree.structure(out)

    def run(self, rule: Interpreter, inputs: Sequence[Any] | None = None) -> Any:
        """The result of `fn`, as `rule` runs it on `inputs` (by default its own)."""
        outs = rule.run(self.jaxpr, self.inputs if inputs is None else inputs)
        return self.unflatten([rule.plain(y) for y in outs])

    def unflatten(self, outs: Sequence[Any]) -> Any:
        """The outputs of the program in the shape in which `fn` returns them."""
        return jax.tree.unflatten(self._out, outs)
