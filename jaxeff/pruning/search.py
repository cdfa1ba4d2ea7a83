"""The search for how much to remove, so that a model keeps within its budgets."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import PyTree

from jaxeff.program import dense, shapes

from .budgets import Budget
from .selection import Selection, Trial

# Halvings of the amount removed: afterwards it is known to a thousandth.
STEPS = 10


def search(
    fn: Callable,
    params: PyTree,
    args: tuple,
    selected: Callable[[float], Selection],
    budgets: Sequence[Budget],
) -> Selection:
    """The selection that removes the least for `at_most`, else the most there is.

    Figures are taken to fall, or to get worse, the more is removed.

    Args:
        fn: the function.
        params: its weights.
        args: example inputs.
        selected: for an amount in [0, 1] what is removed; 1 is the most.
        budgets: all have to be met.

    Raises:
        ValueError: the whole model meets every `at_most` already, or no amount
            meets all budgets.
    """
    tried = _Tried(fn, params, args, selected, budgets)
    costs = [b for b in budgets if b.at_most is not None]
    if costs:
        if tried.meets(0.0, costs):
            said = tried.said(0.0, costs)
            raise ValueError(
                f"the model keeps within its budget as it is: {said}. Nothing has to "
                "be removed; lower the limit."
            )
        if not tried.meets(1.0, costs):
            raise ValueError(
                f"even the least that may stay is too much: {tried.said(1.0, costs)}. "
                "Keep less, lower the floor, choose more couplings or raise the limit."
            )
        amount = _bisect(lambda a: tried.meets(a, costs), bad=0.0, good=1.0)
        if not tried.meets(amount, budgets):
            raise ValueError(
                "the budgets exclude each other: the least removal that is cheap "
                f"enough gives {tried.said(amount, budgets)}. Give up one."
            )
        return tried.result(amount)
    if not tried.meets(0.0, budgets):
        raise ValueError(
            f"the model as it is does not reach what it must: "
            f"{tried.said(0.0, budgets)}. Train it further, or lower the limit."
        )
    if tried.meets(1.0, budgets):
        return tried.result(1.0)
    return tried.result(_bisect(lambda a: tried.meets(a, budgets), bad=1.0, good=0.0))


def _bisect(good_at: Callable[[float], bool], bad: float, good: float) -> float:
    for _ in range(STEPS):
        middle = (bad + good) / 2
        bad, good = (bad, middle) if good_at(middle) else (middle, good)
    return good


class _Tried:
    """Every model that was measured, once."""

    def __init__(
        self,
        fn: Callable,
        params: PyTree,
        args: tuple,
        selected: Callable[[float], Selection],
        budgets: Sequence[Budget],
    ):
        self.fn, self.params, self.args = fn, params, args
        self.selected, self.budgets = selected, budgets
        self.figures: dict[tuple, dict[str, float]] = {}
        self.trials: list[Trial] = []
        self.whole = {b.name: float(b.measure(fn, params, args)) for b in budgets}

    def _measure(self, amount: float) -> dict[str, float]:
        if amount == 0:
            return self.whole
        selection = self.selected(amount)
        # Two amounts may round to the same widths.
        key = tuple(int(mask.sum()) for mask in selection.keep.values())
        if key not in self.figures:
            fn = selection.resize(self.fn)
            form = shapes(dense(self.params))
            small = lambda b: selection.take(form if b.from_shapes else self.params)
            figures = {
                b.name: float(b.measure(fn, small(b), self.args)) for b in self.budgets
            }
            self.figures[key] = figures
            met = all(b.met(figures[b.name], self.whole[b.name]) for b in self.budgets)
            self.trials.append(Trial(amount, figures, met))
        return self.figures[key]

    def meets(self, amount: float, budgets: Sequence[Budget]) -> bool:
        figures = self._measure(amount)
        return all(b.met(figures[b.name], self.whole[b.name]) for b in budgets)

    def said(self, amount: float, budgets: Sequence[Budget]) -> str:
        figures = self._measure(amount)
        limit = lambda b: b.limit(self.whole[b.name])
        return ", ".join(
            f"{b.name} {figures[b.name]:,.6g} (limit {limit(b):,.6g})" for b in budgets
        )

    def result(self, amount: float) -> Selection:
        return dataclasses.replace(self.selected(amount), trials=tuple(self.trials))
