"""The search for how much to remove, so that a model keeps within its budgets.

First how much of everything, by halving. Widths are whole numbers, often of several
indices, so a part of a budget is left: then couplings get some back, one by one, while
it holds.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxtyping import PyTree

from jaxeff.program import shapes

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
        budgets: all have to be met; told apart by name.

    Raises:
        ValueError: the whole model meets every `at_most` already, or no amount meets
            all budgets.
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
        result = tried.result(amount)
        if all(b.from_shapes for b in costs):
            result = tried.filled(amount, larger, costs)
        figures = tried.figures(result, budgets)
        if not tried.met(figures, budgets):
            raise ValueError(
                "the budgets exclude each other: the least removal that is cheap "
                f"enough gives {tried.told(figures, budgets)}. Give up one."
            )
        if len(costs) == len(budgets):
            return result
        last = Trial(amount, figures, True)
        return dataclasses.replace(result, trials=(*result.trials, last))
    if not tried.meets(0.0, budgets):
        raise ValueError(
            f"the model as it is does not reach what it must: "
            f"{tried.said(0.0, budgets)}. Train it further, or lower the limit."
        )
    if tried.meets(1.0, budgets):
        return tried.result(1.0)
    most = tried.result(_bisect(lambda a: tried.meets(a, budgets), bad=1.0, good=0.0))
    if not most.removed:
        least = min((t for t in most.trials if not t.met), key=lambda t: t.amount)
        raise ValueError(
            "nothing may leave: the least removal that was tried gives "
            f"{tried.told(least.figures, budgets)}. Lower the limit, or allow "
            "narrower steps by a smaller multiple."
        )
    return most


def _bisect(good_at: Callable[[float], bool], bad: float, good: float) -> float:
    for _ in range(STEPS):
        middle = (bad + good) / 2
        bad, good = (bad, middle) if good_at(middle) else (middle, good)
    return good


def _widths(selection: Selection) -> tuple[int, ...]:
    return tuple(int(mask.sum()) for mask in selection.keep.values())


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
        self.selected = selected
        self.known: dict[tuple, dict[str, float]] = {}
        self.tried: set[tuple] = set()
        self.trials: list[Trial] = []
        self.whole = {b.name: float(b.measure(fn, params, args)) for b in budgets}

    def figures(
        self, selection: Selection, budgets: Sequence[Budget]
    ) -> dict[str, float]:
        """Of the smaller model, those of some budgets, by name."""
        known = self.known.setdefault(
            _widths(selection), {} if selection.removed else self.whole
        )
        fn = selection.resize(self.fn)
        form = shapes(self.params)
        for b in budgets:
            if b.name not in known:
                small = selection.take(form if b.from_shapes else self.params)
                known[b.name] = float(b.measure(fn, small, self.args))
        return {b.name: known[b.name] for b in budgets}

    def met(self, figures: Mapping[str, float], budgets: Sequence[Budget]) -> bool:
        """Whether figures keep within all of some budgets."""
        return all(b.met(figures[b.name], self.whole[b.name]) for b in budgets)

    def told(self, figures: Mapping[str, float], budgets: Sequence[Budget]) -> str:
        """Figures and limits, for an error."""
        limit = lambda b: b.limit(self.whole[b.name])
        return ", ".join(
            f"{b.name} {figures[b.name]:,.6g} (limit {limit(b):,.6g})" for b in budgets
        )

    def meets(self, amount: float, budgets: Sequence[Budget]) -> bool:
        """Whether removing an amount keeps within some budgets; a trial."""
        if amount == 0:
            return self.met(self.whole, budgets)
        selection = self.selected(amount)
        figures = self.figures(selection, budgets)
        met = self.met(figures, budgets)
        # Two amounts may round to the same widths.
        if (widths := _widths(selection)) not in self.tried:
            self.tried.add(widths)
            self.trials.append(Trial(amount, figures, met))
        return met

    def said(self, amount: float, budgets: Sequence[Budget]) -> str:
        """What removing an amount gives, for an error."""
        figures = self.whole
        if amount > 0:
            figures = self.figures(self.selected(amount), budgets)
        return self.told(figures, budgets)

    def filled(
        self,
        amount: float,
        larger: Callable[[Selection], Iterable[tuple[str, Selection]]],
        costs: Sequence[Budget],
    ) -> Selection:
        """What is removed at an amount, less what the budgets have room for.

        A coupling for which there is no room has none later, when the model is larger.
        """
        result = self.selected(amount)
        figures = self.figures(result, costs)
        full: set[str] = set()
        used = lambda b: figures[b.name] / b.limit(self.whole[b.name])
        while max(map(used, costs)) < ENOUGH:
            for name, more in larger(result):
                if name in full:
                    continue
                now = self.figures(more, costs)
                if self.met(now, costs):
                    back = more.kept - result.kept
                    self.trials.append(Trial(amount, now, True, (name, back)))
                    result, figures = more, now
                    break
                full.add(name)
            else:
                break
        return dataclasses.replace(result, trials=tuple(self.trials))

    def result(self, amount: float) -> Selection:
        """What is removed at an amount, with all trials."""
        return dataclasses.replace(self.selected(amount), trials=tuple(self.trials))
