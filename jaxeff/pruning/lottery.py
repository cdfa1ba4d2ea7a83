"""Iterative magnitude pruning: train, prune, go back to early weights, again.

What remains after some rounds, with its early weights, is a winning ticket: a sparse
model that trains as well as the dense one. How to train is the caller's affair.

Source: Frankle & Carbin 2019, arXiv:1803.03635; from weights of step k > 0 instead
of the initial ones, Frankle et al. 2020, arXiv:1912.05671, which larger models need.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxeff import tree

from .distributions import Distribution, uniform
from .masks import apply_masks, check, choose_masks, cover, like, Rule
from .patterns import Pattern, Unstructured
from .schedules import check_schedules, check_steps, final_sparsity, Schedules
from .transforms import covered


class Ticket(NamedTuple):
    """What a round leaves: arrays only, so any checkpoint stores it.

    Attributes:
        round: how many rounds were made.
        params: what the next round starts from; 0 where a mask is False.
        masks: like params, True = kept; None where nothing is pruned.
        trained: the weights that the masks were chosen from, trained with the masks
            of the round before.
    """

    round: Int[Array, ""]
    params: PyTree
    masks: PyTree
    trained: PyTree


def lottery_tickets(
    train: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    schedule: Schedules,
    *,
    rounds: int,
    rewind: bool = True,
    only: tree.Patterns | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = uniform,
    start: Ticket | None = None,
) -> Iterator[Ticket]:
    """Runs rounds of training and pruning, one for each item that is asked for.

    Store a ticket and pass it as `start`, with all else as it was, to go on from it.

    Law: a run that goes on from a ticket yields what the whole run would have.

    Args:
        train: `train(params, masks) -> params` trains from the given weights to the
            end, and keeps what the masks drop at zero: `fix_masks(masks)` last in
            the chain of its optimizer does.
        params: where every round starts: the initial weights; for late rewinding
            those after some steps of dense training, with a `train` that goes on
            from that step.
        schedule: maps the round, from 0, to the fraction that is gone after it, or
            several by pattern. `periodic(0.2, begin=0, every=1, times=rounds)` is
            the paper's.
        rounds: how many there are in all, those before `start` included.
        rewind: False goes on from the trained weights, as learning-rate rewinding
            does (Renda et al. 2020, arXiv:2003.02389).
        only, pattern, distribution: as for `prune`.
        start: a ticket of an earlier run.

    Raises:
        ValueError: as for `prune`, or `train` returned another tree, or weights that
            a mask drops and that are not zero.
    """
    check_steps("rounds", rounds, least=1)
    check_schedules(schedule)
    pattern = pattern or Unstructured()
    rules = cover(params, schedule, only)
    check(rules, params, pattern, final_sparsity)
    if start is None:
        keep_all = {path: jnp.ones_like(w, bool) for path, w in covered(rules, params)}
        start = Ticket(jnp.int32(0), params, like(params, keep_all), params)

    @jax.jit
    def prune(trained, masks, turn):
        now = [Rule(r.paths, jnp.asarray(r.value(turn), jnp.float32)) for r in rules]
        scores = {path: jnp.abs(w) for path, w in covered(rules, trained)}
        chosen = choose_masks(
            now,
            scores,
            pattern=pattern,
            distribution=distribution,
            kept=tree.paths(masks),
        )
        masks = like(params, chosen)
        return apply_masks(params if rewind else trained, masks), masks

    return _rounds(train, prune, start, rounds)


def _rounds(
    train: Callable, prune: Callable, ticket: Ticket, rounds: int
) -> Iterator[Ticket]:
    for turn in range(int(ticket.round), rounds):
        trained = train(ticket.params, ticket.masks)
        _check_trained(trained, ticket)
        params, masks = prune(trained, ticket.masks, jnp.int32(turn))
        ticket = Ticket(jnp.int32(turn + 1), params, masks, trained)
        yield ticket


def _check_trained(trained: PyTree, ticket: Ticket) -> None:
    shapes = lambda t: {(path, jnp.shape(x)) for path, x in tree.paths(t).items()}
    if differ := shapes(trained) ^ shapes(ticket.params):
        raise ValueError(
            "train returns weights like those it was given, but they differ in "
            f"{sorted(differ)}. Return the parameters alone."
        )
    weights = tree.paths(trained)
    for path, mask in tree.paths(ticket.masks).items():
        if alive := int(np.sum((np.asarray(weights[path]) != 0) & ~np.asarray(mask))):
            raise ValueError(
                f"train keeps dropped weights at zero, but {alive} of {path} are not. "
                "Chain `fix_masks(masks)` last in its optimizer."
            )
