"""The search for how much to remove, so that a model keeps within its budgets.

First how much of everything, by halving. Widths are whole numbers, often of several
indices, so a part of a budget is left: then couplings get some back, one by one, while
it holds.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jaxtyping import PyTree

from jaxeff.program import dense, shapes

from .budgets import Budget
from .selection import Selection, Trial

# Halvings of the amount removed: afterwards it is known to a thousandth.
STEPS = 10
# Of a budget, that may be left.
ENOUGH = 0.999


def search(
    fn: Callable,
    params: PyTree,
    args: tuple,
    selected: Callable[[float], Selection],
    larger: Callable[[Selection], Iterable[tuple[str, Selection]]],
    budgets: Sequence[Budget],
) -> Selection:
    """The selection that removes the least for `at_most`, else the most there is.

    Figures are taken to fall, or to get worse, the more is removed.

    Args:
        fn: the function.
        params: its weights.
        args: example inputs.
        selected: for an amount in [0, 1] what is removed; 1 is the most.
        larger: of a selection those where one coupling gets something back, by its
            name, the most welcome first.
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
        if all(b.from_shapes for b in costs):
            return tried.filled(amount, larger, costs)
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
            figures = self._figures(selection, self.budgets)
            self.figures[key] = figures
            self.trials.append(Trial(amount, figures, self._met(figures, self.budgets)))
        return self.figures[key]

    def _figures(
        self, selection: Selection, budgets: Sequence[Budget]
    ) -> dict[str, float]:
        fn = selection.resize(self.fn)
        form = shapes(dense(self.params))
        small = lambda b: selection.take(form if b.from_shapes else self.params)
        return {b.name: float(b.measure(fn, small(b), self.args)) for b in budgets}

    def _met(self, figures: dict[str, float], budgets: Sequence[Budget]) -> bool:
        return all(b.met(figures[b.name], self.whole[b.name]) for b in budgets)

    def meets(self, amount: float, budgets: Sequence[Budget]) -> bool:
        return self._met(self._measure(amount), budgets)

    def said(self, amount: float, budgets: Sequence[Budget]) -> str:
        figures = self._measure(amount)
        limit = lambda b: b.limit(self.whole[b.name])
        return ", ".join(
            f"{b.name} {figures[b.name]:,.6g} (limit {limit(b):,.6g})" for b in budgets
        )

    def filled(
        self,
        amount: float,
        larger: Callable[[Selection], Iterable[tuple[str, Selection]]],
        costs: Sequence[Budget],
    ) -> Selection:
        """What is removed at an amount, less what the budgets have room for.

        A coupling for which there is no room has none later, when the model is larger.
        """
        result, figures = self.selected(amount), self._measure(amount)
        full: set[str] = set()
        used = lambda b: figures[b.name] / b.limit(self.whole[b.name])
        while max(map(used, costs)) < ENOUGH:
            for name, more in larger(result):
                if name in full:
                    continue
                now = self._figures(more, costs)
                if self._met(now, costs):
                    back = more.kept - result.kept
                    self.trials.append(Trial(amount, now, True, (name, back)))
                    result, figures = more, now
                    break
                full.add(name)
            else:
                break
        return dataclasses.replace(result, trials=tuple(self.trials))

    def result(self, amount: float) -> Selection:
        return dataclasses.replace(self.selected(amount), trials=tuple(self.trials))
