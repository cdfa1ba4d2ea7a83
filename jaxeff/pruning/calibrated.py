"""Pruning a trained model at once, without training: magnitude, Wanda, SparseGPT.

Each takes the same share of every weight it covers, and puts zeros into the arrays
where they stand; `compact` then stores what is left in less.

Sources: Wanda: Sun et al. 2023, arXiv:2306.11695; SparseGPT: Frantar & Alistarh
2023, arXiv:2301.00774.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import (
    calibrate,
    Candidate,
    change_parts,
    check_batches,
    find_uses,
    gram,
    Memory,
    squares,
)

from .lowest import drop_anywhere, drop_by_row, NM, parse_sparsity, Sparsity
from .sparsegpt import prune_matrix


def prune_magnitude(
    fn: Callable,
    params: PyTree,
    *args: Any,
    sparsity: float | int | str = 0.5,
    only: tree.Patterns | None = None,
) -> tuple[Callable, PyTree]:
    """Drops the smallest weights; needs no data. The baseline of the other two.

    Exactly int(size * sparsity) of each weight go (of each layer of a stack for a
    scan), wherever in it they are.

    Args:
        fn: `fn(params, *args)`.
        params: its weights.
        args: example inputs, or their shapes.
        sparsity: the fraction that goes, in [0, 1), or a pattern "N:M": N of each M
            neighbouring inputs of an output stay (of a convolution: neighbouring
            channels of one place, if they are a multiple of M).
        only: patterns of the weights to prune. By default every weight that
            products and convolutions use and nothing looks up; for a language model
            name what leaves out its output layer.

    Returns:
        `fn` and the new weights, with exact zeros. `prunable`, given the same
        arguments, says which weights stay as they are and why.

    Raises:
        ValueError: a pattern matches no weight, or none that can be pruned;
            `sparsity` is neither a fraction nor a pattern.
    """
    amount = parse_sparsity(sparsity)
    weights = _chosen(fn, params, args, amount, only)

    def update(part, w):
        return jnp.where(drop_anywhere(jnp.abs(w), amount), 0, w)

    return fn, change_parts(fn, params, *args, weights=weights, update=update)


def wanda(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    sparsity: float | int | str = 0.5,
    only: tree.Patterns | None = None,
    compare: str = "output",
    resume: str | Path | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Drops weights by magnitude times the norm of their input, output by output.

    Of each output exactly int(inputs * sparsity) weights go, those with the least
    |w| * ||x||_2; among equals the first. The weights that stay do not change. Each
    weight sees inputs computed by those pruned before it.

    Args:
        fn, params, args, sparsity, only: as for `prune_magnitude`.
        batches: tuples of arguments to calibrate with, all of the same shapes.
        compare: "output": weights of one output with each other, as the paper does
            for language models. "layer": all of a layer; int(size * sparsity) go.
        resume: a folder that remembers each weight that is done, so that a second run
            with the same arguments goes on where the first was stopped. It may be
            deleted once the result is saved.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `fn` and the new weights, with exact zeros.

    Raises:
        ValueError: as `prune_magnitude`; or there is no batch, two differ in shape,
            what flows into a weight is not finite, or `resume` holds parts of another
            run.

    Source: Sun et al. 2023, arXiv:2306.11695, section 3.
    """
    if compare not in ("output", "layer"):
        raise ValueError(
            f"Wanda compares weights of one 'output' or of a whole 'layer', got "
            f"{compare!r}."
        )
    drop = drop_by_row if compare == "output" else drop_anywhere
    amount = parse_sparsity(sparsity)
    weights = _chosen(fn, params, args, amount, only)

    given = check_batches(batches)
    options = ("wanda", str(amount), compare, weights)
    memory = Memory.at(resume, fn, params, given, *options)

    def update(part, w, total):
        score = jnp.abs(w) * jnp.sqrt(total)[:, None]
        return jnp.where(drop(score, amount), 0, w)

    return fn, calibrate(
        fn,
        params,
        given,
        weights=weights,
        statistic=squares,
        update=update,
        memory=memory,
        progress=progress,
    )


def sparsegpt(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    sparsity: float | int | str = 0.5,
    only: tree.Patterns | None = None,
    block: int = 128,
    damping: float = 0.01,
    resume: str | Path | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Drops weights and changes those that stay, so that outputs change least.

    Of each weight exactly int(size * sparsity) elements go. Needs a matrix of
    (inputs, inputs) for one weight at a time, and time cubic in the inputs.

    Args:
        fn, params, args, batches, sparsity, only, resume, progress: as for `wanda`.
        block: inputs among which the least important are chosen at a time.
        damping: times the mean squared input is added to each squared input; more
            of it trusts few data less.

    Returns:
        `fn` and the new weights, with exact zeros.

    Raises:
        ValueError: as `wanda`; `block` is below 1, `damping` not above 0.

    Source: Frantar & Alistarh 2023, arXiv:2301.00774, section 3.
    """
    if block < 1 or not damping > 0:
        raise ValueError(
            f"block counts columns and damping keeps the inverse finite, so block >= 1 "
            f"and damping > 0, got {block} and {damping}: the paper takes 128 and 0.01."
        )
    amount = parse_sparsity(sparsity)
    weights = _chosen(fn, params, args, amount, only)
    given = check_batches(batches)
    options = ("sparsegpt", str(amount), block, damping, weights)
    memory = Memory.at(resume, fn, params, given, *options)
    prune = lambda w, h: prune_matrix(w, h, amount, block=block, damping=damping)

    def update(part, w, total):
        return jax.vmap(prune)(w, total)

    return fn, calibrate(
        fn,
        params,
        given,
        weights=weights,
        statistic=gram,
        update=update,
        memory=memory,
        progress=progress,
    )


def prunable(
    fn: Callable,
    params: PyTree,
    *args: Any,
    sparsity: float | int | str = 0.5,
    only: tree.Patterns | None = None,
) -> dict[str, str]:
    """For each weight why one-shot pruning leaves it as it is; empty where it prunes.

    Args:
        fn, params, args, sparsity, only: as for `prune_magnitude`; shapes will do.
    """
    amount = parse_sparsity(sparsity)
    uses = find_uses(fn, params, args)
    named = None if only is None else set(tree.match(only, uses.candidates))
    return {p: _reason(c, amount, named) for p, c in uses.candidates.items()}


def _reason(c: Candidate, sparsity: Sparsity, named: set[str] | None) -> str:
    if c.reason:
        return c.reason
    if named is None and c.looked_up:
        return "rows of it are looked up too, of which no statistic tells"
    if named is not None and c.path not in named:
        return "no pattern matches it"
    if isinstance(sparsity, NM):
        odd = [part.cols for part in c.parts if part.cols % sparsity.m]
        if odd:
            return f"its {odd[0]} inputs are no multiple of {sparsity.m}"
    return ""


def _chosen(
    fn: Callable,
    params: PyTree,
    args: tuple,
    sparsity: Sparsity,
    only: tree.Patterns | None,
) -> list[str]:
    """The paths to prune."""
    amount = f"{sparsity.n}:{sparsity.m}" if isinstance(sparsity, NM) else sparsity
    reasons = prunable(fn, params, *args, sparsity=amount, only=only)
    patterns = ["**"] if only is None else [only] if isinstance(only, str) else only
    way_out = "Name kernels, with a sparsity that fits them."
    tree.check_some(patterns, reasons, does="prunes", way_out=way_out)
    return [p for p, reason in reasons.items() if not reason]
