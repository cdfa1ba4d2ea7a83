"""What was chosen to leave: applied to functions, weights and optimizer states."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from jaxeff.program import (
    Couplings,
    data_reaches,
    dense,
    is_leaf,
    keep_in_state,
    keep_indices,
    lift,
    make_plan,
    notes,
    Plan,
    resize,
    shapes,
    table,
    trace,
    unlift,
    zero_indices,
)

from .outputs import relative_error


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model of a search.

    Attributes:
        amount: how far to the most that may be removed, in [0, 1].
        figures: its figure for each budget, by name.
        met: whether it kept within all of them.
        back: the coupling that got indices back, and how many.
    """

    amount: float
    figures: Mapping[str, float]
    met: bool
    back: tuple[str, int] | None = None

    def __str__(self) -> str:
        figures = ", ".join(f"{n} {x:,.6g}" for n, x in self.figures.items())
        if self.back is not None:
            return f"room for {self.back[1]} more of {self.back[0]}: {figures}"
        return (
            f"tried {self.amount:.0%} of the most: {figures}{' (no)' * (not self.met)}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Which indices of which couplings stay.

    Attributes:
        couplings: of the function.
        keep: for each coupling that was chosen, by name, which indices stay (True).
        inexact: some of them change the function by more than their zeros.
        error: how much, relative to the norm of the outputs on the example inputs:
            None where the result is exact or only shapes of inputs are known.
        trials: of the search for a budget, in order.
        whole: for couplings, by name, how many indices they had before an earlier
            round, where there was one.
    """

    couplings: Couplings
    keep: Mapping[str, Bool[np.ndarray, " _"]]
    inexact: bool = False
    error: float | None = None
    trials: tuple[Trial, ...] = ()
    whole: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def before(self, couplings: Couplings) -> dict[str, int]:
        """How many indices couplings of the smaller function had, before all rounds.

        Args:
            couplings: of the function that this selection left.
        """
        left = [
            (
                c.members,
                int(self.keep[c.name].sum()) if c.name in self.keep else c.size,
                self.whole.get(c.name, c.size),
            )
            for c in self.couplings
        ]
        sizes = {}
        for c in couplings:
            # Names are counted anew, and what has one index left is no coupling.
            same = (x for x in left if x[:2] == (c.members, c.size))
            if (found := next(same, None)) is not None:
                left.remove(found)
            sizes[c.name] = c.size if found is None else found[2]
        return sizes

    @property
    def removed(self) -> int:
        """How many indices leave, over all couplings."""
        return sum(int((~mask).sum()) for mask in self.keep.values())

    @property
    def kept(self) -> int:
        """How many stay, over all couplings that were chosen."""
        return sum(int(mask.sum()) for mask in self.keep.values())

    @functools.cached_property
    def plan(self) -> Plan:
        """The sizes that the function runs with."""
        return make_plan(self.couplings, self.keep, inexact=self.inexact)

    def resize(self, fn: Callable) -> Callable:
        """A function of the weights, the one chosen for or another, as it runs now."""
        small = resize(unlift(fn), self.plan)
        return small if unlift(fn) is fn else lift(small)

    def take(self, params: PyTree) -> PyTree:
        """The weights without what leaves.

        Raises:
            ValueError: they are not those that were chosen from.
        """
        return keep_indices(params, self.couplings, self.keep)

    def take_state(self, state: PyTree) -> PyTree:
        """An optimizer state, or any tree that holds arrays for each weight, likewise.

        Moments lose what their weights lose, counts stay: training goes on. An array
        belongs to the weight whose path ends its own (`0/mu/params/up/kernel`), also
        where the state was made of a part of the weights. (Where an optimizer chooses
        by size what to store, as Adafactor does, a small weight may want another form
        of state: then start it anew.)

        Raises:
            ValueError: no array belongs to a weight, one to several, or its dims
                cannot be told to be those of its weight.
        """
        return keep_in_state(state, self.couplings, self.keep)

    def zeroed(self, params: PyTree) -> PyTree:
        """Dense weights of the old shapes, with zeros where something leaves."""
        return zero_indices(params, self.couplings, self.keep)

    def checked(self, fn: Callable, params: PyTree, args: tuple) -> "Selection":
        """The same, once it is known to leave a function of the data.

        Raises:
            ValueError: what is left does not depend on the data any more.
        """
        gone = [n for n, mask in self.keep.items() if not mask.any()]
        if gone and not self.connected(unlift(fn), shapes(dense(params)), args):
            raise ValueError(
                f"without the couplings {', '.join(gone)} no output depends on the "
                "inputs any more. Only what a residual connection goes around can be "
                "taken out altogether."
            )
        arrays = jax.tree.leaves(args)
        known = not any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
        if not (self.inexact and known):
            return self
        want = jax.jit(unlift(fn))(self.zeroed(params), *args)
        got = jax.jit(self.resize(unlift(fn)))(self.take(dense(params)), *args)
        error = float(relative_error(got, want)) ** 0.5
        return dataclasses.replace(self, error=error)

    def connected(self, fn: Callable, params: PyTree, args: tuple) -> bool:
        """Whether an output still depends on the inputs without what leaves.

        Args:
            fn: the function, of dense weights.
            params: their shapes.
            args: example inputs, or their shapes.
        """
        program = trace(self.resize(fn), self.take(params), *args)
        data = [path is None for path in program.weights]
        return any(data_reaches(program.jaxpr, data))

    def __str__(self) -> str:
        rows = [
            (
                c.name,
                _first(sorted({p for p, _ in c.members})),
                f"{c.size:,}",
                f"{int(self.keep[c.name].sum()):,}",
            )
            for c in self.couplings
            if c.name in self.keep
        ]
        lines = [table(("coupling", "weights", "indices", "stay"), rows)]
        whole = [c for c in self.couplings if c.name not in self.keep]
        lines += notes(
            (c.name, "frozen: " + str(c.reason) if c.frozen else "not chosen")
            for c in whole
        )
        if self.error is not None:
            lines.append(f"not exact: the outputs are off by {self.error:.2%}")
        lines += map(str, self.trials)
        return "\n".join(lines)


def _first(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def is_lifted(fn: Callable, params: PyTree) -> bool:
    """Whether a function runs compressed weights, or has to."""
    weights = jax.tree.leaves(params, is_leaf=is_leaf)
    return unlift(fn) is not fn or any(map(is_leaf, weights))
