"""Structured pruning: channels, neurons and heads leave, and the arrays shrink.

What must leave together is the program's couplings; which indices of each
stay, a score decides. The smaller function is exact (see `program.resize`):
it equals the original with the removed indices set to zero.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from jaxeff.program import lift, shapes, trace, unlift

from .budgets import Budget
from .select import as_budgets, Budgets, check_fractions, Keep, select
from .selection import is_lifted, Selection


def shrink(
    fn: Callable, params: PyTree, *args: Any, keep: Keep | None = None, **options: Any
) -> tuple[Callable, PyTree]:
    """Removes the least important channels, neurons and heads, and really shrinks.

    To see what leaves, and to take it from an optimizer state too, go the two steps
    of this function: `chosen = select(...)`, then `chosen.resize(fn)`,
    `chosen.take(params)`, `chosen.take_state(opt_state)`. To fine-tune a shrunk model
    with another function of the same weights (one that updates batch statistics,
    say), run that one likewise: `program.like(small_fn, train_fn)`.

    Args:
        fn: `fn(params, *args)`, as used for evaluation (without dropout).
        params: its weights; compressed ones lose indices too.
        args: example inputs, or their shapes. The result takes any batch size.
        keep: the fraction of each coupling's indices that stays, by default 0.5, or
            fractions by pattern; see `select`.
        options: further ones of `select`: score, scope, floor, multiple, budget ...

    Returns:
        A function and smaller weights, in the same tree.

    Raises:
        ValueError: as `select` does.
    """
    return _without(select(fn, params, *args, keep=keep, **options), fn, params)


def _without(
    chosen: Selection, fn: Callable, params: PyTree
) -> tuple[Callable, PyTree]:
    small_fn = chosen.resize(fn)
    if is_lifted(fn, params):
        small_fn = lift(small_fn)
    return small_fn, chosen.take(params)


def shrink_in_rounds(
    fn: Callable,
    params: PyTree,
    *args: Any,
    rounds: int,
    finetune: Callable[[int, Callable, PyTree], PyTree],
    keep: Keep | None = None,
    budget: Budgets = (),
    **options: Any,
) -> tuple[Callable, PyTree]:
    """Shrinks a little, trains, and shrinks again, so that the model can recover.

    After round n of N there is keep ** (n / N) of each coupling's indices left, of all
    that it had, up to the rounding of widths. A budget's `at_most` comes nearer in the
    same way, from the figure of the whole model; `at_least` holds in every round.

    Args:
        fn: `fn(params, *args)`, as used for evaluation.
        params: its weights.
        args: example inputs, or their shapes.
        rounds: how often.
        finetune: `finetune(round, fn, params) -> params` trains the model of a round,
            counted from 0; a score that looks at data sees what it returns.
        keep: the fraction that stays after all rounds, or fractions by pattern, by
            default 0.5. With a budget: what stays at least, after any round.
        budget: one or several; one at least says `at_most`.
        options: further ones of `select`.

    Raises:
        ValueError: `rounds` is below 1, a fraction is 0, no budget says `at_most`,
            `finetune` returns nothing, or as `select` does.

    Source: Molchanov et al. 2017, arXiv:1611.06440, section 2 (iterative pruning).
    """
    budgets = as_budgets(budget)
    fractions = keep if isinstance(keep, Mapping) else {"**": keep}
    if keep is None:
        fractions = {"**": 0.5}
    if rounds < 1 or not (budgets or all(fractions.values())):
        raise ValueError(
            f"{rounds} rounds cannot keep {keep}: take at least 1 round, each of which "
            "keeps a part of what it finds."
        )
    check_fractions(fractions)
    if budgets and all(b.at_most is None for b in budgets):
        raise ValueError(
            "rounds come nearer to an at_most, step by step, but no budget has one: "
            "all that at_least allows would leave in the first. Use `shrink`."
        )
    chosen = Selection(trace(unlift(fn), shapes(params), *args).couplings, {})
    whole = {b.name: float(b.measure(fn, params, args)) for b in budgets}
    for n in range(rounds):
        share = (n + 1) / rounds
        part: Any = keep
        if not budgets:
            part = {pattern: f**share for pattern, f in fractions.items()}
        now = [_nearer(b, whole[b.name], share) for b in budgets]
        costs = [b for b in now if b.at_most is not None]
        small = fn, params
        if not all(b.met(b.measure(fn, params, args), 0.0) for b in costs) or not costs:
            options |= {"keep": part, "budget": now, "after": chosen}
            chosen = select(fn, params, *args, **options)
            small = _without(chosen, fn, params)
        if n == 0 and not chosen.removed:
            # Together they have to remove something; better told before training.
            options |= {"keep": keep, "budget": budgets, "after": None}
            select(fn, params, *args, **options)
        fn, params = small
        params = finetune(n, fn, params)
        if params is None:
            raise ValueError(
                "finetune(round, fn, params) returns the trained weights, but it "
                "returned None. Write `return params` at its end."
            )
    return fn, params


def _nearer(budget: Budget, whole: float, share: float) -> Budget:
    """A budget after a share of the rounds."""
    limit = budget.limit(whole)
    if budget.at_most is None:
        return dataclasses.replace(budget, at_least=limit, relative=False)
    near = whole * (limit / whole) ** share if share < 1 else limit
    return dataclasses.replace(budget, at_most=near, relative=False)
