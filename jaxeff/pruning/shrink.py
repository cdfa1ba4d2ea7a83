"""Structured pruning: channels, neurons and heads leave, and the arrays shrink.

What must leave together is the program's couplings; which indices of each
stay, a score decides. The smaller function is exact (see `program.resize`):
it equals the original with the removed indices set to zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from jaxeff import tree
from jaxeff.program import (
    Coupling,
    dense,
    is_leaf,
    keep_indices,
    lift,
    make_plan,
    Program,
    resize,
    shapes,
    trace,
    unlift,
)

from .scores import magnitude, Score


def shrink(
    fn: Callable,
    params: PyTree,
    *args: Any,
    keep: float | int | Mapping[str, float | int] = 0.5,
    score: Score | None = None,
) -> tuple[Callable, PyTree]:
    """Removes the least important channels, neurons and heads, and really shrinks.

    To fine-tune a shrunk model with another function of the same weights (one
    that updates batch statistics, say), run that one likewise:
    `program.like(small_fn, train_fn)`.

    Args:
        fn: `fn(params, *args)`, as used for evaluation (without dropout).
        params: its weights; compressed ones lose indices too.
        args: example inputs, or their shapes. The result takes any batch size.
        keep: the fraction of each coupling's indices that stays, in (0, 1]; at
            least one always does. Or fractions by pattern: a pattern chooses
            the couplings of which *all* multiplying weights match it, the first
            match counts, and couplings no pattern chooses stay whole.
        score: how much each element matters; by default `magnitude(2)`.

    Returns:
        A function and smaller weights, in the same tree.

    Raises:
        ValueError: `keep` is outside (0, 1], a pattern matches no weight or
            chooses nothing, or nothing in this function can be removed.
    """
    if any(isinstance(w, jax.ShapeDtypeStruct) for w in jax.tree.leaves(params)):
        raise ValueError(
            "which indices stay depends on the values of the weights, but only shapes "
            "are given. Pass arrays; `trace` looks at shapes."
        )
    program = trace(unlift(fn), shapes(params), *args)
    chosen = _fractions(program, keep)
    masks = choose(program, dense(params), chosen, score or magnitude(2))
    plan = make_plan(program.couplings, masks)
    small = keep_indices(params, program.couplings, masks)
    small_fn = resize(unlift(fn), plan)
    weights = jax.tree.leaves(params, is_leaf=is_leaf)
    lifted = unlift(fn) is not fn or any(map(is_leaf, weights))
    return (lift(small_fn) if lifted else small_fn), small


def choose(
    program: Program, params: PyTree, fractions: Mapping[str, float | int], score: Score
) -> dict[str, Bool[np.ndarray, " _"]]:
    """For each coupling named, which of its indices stay (True): the best scored.

    Args:
        program: of `params`.
        params: dense weights.
        fractions: for couplings, by name, the fraction to keep.
        score: see `scores.py`.
    """
    scores = program.couplings.sums(
        score(program, tree.paths(params)), names=list(fractions)
    )
    masks = {}
    for name, total in scores.items():
        n = max(1, round(fractions[name] * total.size))
        # A stable order: among equals the first stay, on every machine.
        best = np.argsort(-total, kind="stable")[:n]
        masks[name] = np.zeros(total.size, bool)
        masks[name][best] = True
    return masks


def _fractions(
    program: Program, keep: float | int | Mapping[str, float | int]
) -> dict[str, float | int]:
    """For each coupling to be shrunk, by name, the fraction to keep."""
    rules = keep if isinstance(keep, Mapping) else {"**": keep}
    for fraction in rules.values():
        if not 0 < fraction <= 1:
            raise ValueError(
                f"keep is the fraction that stays, in (0, 1], got {fraction}: 0.5 "
                "keeps half."
            )
    couplings, paths = program.couplings, list(program.shapes)
    multiplying = {site.path for site in program.sites}
    if not couplings.free:
        raise ValueError(f"nothing in this function can be removed. {_why(couplings)}")
    out: dict[str, float | int] = {}
    for pattern, fraction in rules.items():
        matched = set(tree.match(pattern, paths))
        hit = [
            c
            for c in couplings.free
            if {p for p, _ in c.members} & matched
            and {p for p, _ in c.members} & multiplying <= matched
        ]
        if not hit:
            near = [c for c in couplings if {p for p, _ in c.members} & matched]
            raise ValueError(
                f"pattern {pattern!r} chooses no coupling: each couples weights that "
                f"it does not match, or is frozen. {_why(near, matched)}"
            )
        for c in hit:
            out.setdefault(c.name, fraction)
    return out


def _why(couplings: Sequence[Coupling], matched: set[str] | None = None) -> str:
    """The first few couplings, and what stands against each."""
    said = []
    for c in couplings[:4]:
        others = sorted({p for p, _ in c.members} - (matched or set()))
        why = c.reason if c.frozen else f"it also holds {', '.join(others[:3])}"
        path, dim = c.members[0]
        said.append(f"{c.name} (dim {dim} of {path}, size {c.size}): {why}")
    return "; ".join(said) + "."
