"""Structured pruning: channels, neurons and heads leave, and the arrays shrink.

What must leave together is the program's couplings; which indices of each
stay, a score decides. The smaller function is exact (see `program.resize`):
it equals the original with the removed indices set to zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from jaxeff.program import lift

from .select import Keep, select
from .selection import is_lifted


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
    chosen = select(fn, params, *args, keep=keep, **options)
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
    keep: float | int | Mapping[str, float | int] = 0.5,
    **options: Any,
) -> tuple[Callable, PyTree]:
    """Shrinks a little, trains, and shrinks again, so that the model can recover.

    Each round keeps the same fraction of what the last one left: the rounds together
    keep `keep`, up to the rounding of widths.

    Args:
        fn: `fn(params, *args)`, as used for evaluation.
        params: its weights.
        args: example inputs, or their shapes.
        rounds: how often.
        finetune: `finetune(round, fn, params) -> params` trains the model of a round,
            counted from 0; a score that looks at data sees what it returns.
        keep: the fraction that stays after all rounds, or fractions by pattern.
        options: further ones of `select`, except a budget.

    Raises:
        ValueError: `rounds` is below 1, a fraction is 0, or as `select` does.

    Source: Molchanov et al. 2017, arXiv:1611.06440, section 2 (iterative pruning).
    """
    fractions = keep if isinstance(keep, Mapping) else {"**": keep}
    if rounds < 1 or not all(fractions.values()):
        raise ValueError(
            f"{rounds} rounds cannot keep {keep}: take at least 1 round, each of which "
            "keeps a part of what it finds."
        )
    each = {pattern: f ** (1 / rounds) for pattern, f in fractions.items()}
    for n in range(rounds):
        fn, params = shrink(fn, params, *args, keep=each, **options)
        params = finetune(n, fn, params)
    return fn, params
