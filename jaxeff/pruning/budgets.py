"""What a smaller model may cost, or must still achieve: the ends of a search."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from jaxeff.program import dense_size, shapes, trace

Measure = Callable[[Callable, PyTree, tuple], float | int]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A figure of a model, and its limit.

    Anything that can be measured will do: `Budget("latency in s", lambda fn, params,
    args: cost.latency(fn, params, *args).median, at_most=0.003)`, or `Budget(
    "accuracy", lambda fn, params, args: accuracy(fn, params, test), at_least=0.912)`.

    Attributes:
        name: with its unit, for the report.
        measure: `measure(fn, params, args)`, where `args` are the example inputs.
        at_most, at_least: the limit, one of them.
        relative: the limit is a fraction of the figure of the model as it was.
        from_shapes: the measure needs no values: `params` may be shapes.
    """

    name: str
    measure: Measure
    at_most: float | int | None = None
    at_least: float | int | None = None
    relative: bool = False
    from_shapes: bool = False

    def __post_init__(self) -> None:
        """Refuses anything but one limit."""
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(
                f"the budget {self.name!r} has one limit, at_most or at_least, got "
                f"{self.at_most} and {self.at_least}. Give each limit its own budget."
            )

    def limit(self, whole: float | int) -> float | int:
        """The limit in the unit of the measure, given the figure of the whole model."""
        at = self.at_most if self.at_most is not None else self.at_least
        assert at is not None
        return at * whole if self.relative else at

    def met(self, value: float | int, whole: float | int) -> bool:
        """Whether a figure keeps within the limit."""
        limit = self.limit(whole)
        return value <= limit if self.at_most is not None else value >= limit


def flops(at_most: float | int) -> Budget:
    """FLOPs of one call on the example inputs, a multiply-add counted as 2.

    Args:
        at_most: a float up to 1 is a fraction of the whole model's, else a number.
    """
    measure = lambda fn, params, args: trace(fn, shapes(params), *args).costs.flops
    relative = _is_fraction("flops", at_most)
    return Budget("FLOPs", measure, at_most, relative=relative, from_shapes=True)


def parameters(at_most: float | int) -> Budget:
    """Numbers among the weights, statistics of batch norms included.

    A compressed weight counts as the dense one that it stands for.

    Args:
        at_most: a float up to 1 is a fraction of the whole model's, else a number.
    """
    measure = lambda fn, params, args: dense_size(params)
    relative = _is_fraction("parameters", at_most)
    return Budget("parameters", measure, at_most, relative=relative, from_shapes=True)


def _is_fraction(name: str, limit: Any) -> bool:
    if limit <= 0:
        raise ValueError(
            f"{name} can be a fraction in (0, 1] of the whole model's, or a number "
            f"above 1, got {limit}."
        )
    return isinstance(limit, float) and limit <= 1
