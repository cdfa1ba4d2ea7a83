"""Which indices of which couplings leave: by scores, under a fraction or a budget."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from jaxeff import tree
from jaxeff.program import Coupling, Couplings, dense, Program, shapes, trace, unlift

from .budgets import Budget
from .scores import magnitude, Score, Scores
from .search import search
from .selection import Selection

# Checked below, with words.
Keep = Any  # a fraction, or fractions by pattern
Budgets = Any  # a Budget, or several


@dataclasses.dataclass(frozen=True)
class Widths:
    """How many indices a coupling may have left.

    Attributes:
        floor: at least so many.
        multiple: a multiple of this, or all there are.
    """

    floor: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        """Refuses counts below 1."""
        for name in ("floor", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} counts indices and is at least 1, got "
                    f"{getattr(self, name)}. 1 allows every width."
                )

    def next(self, n: int, size: int) -> int:
        """The allowed width after `n`."""
        return min(n + self.multiple - n % self.multiple, size)

    def nearest(self, n: int, size: int) -> int:
        """The allowed width nearest to `n`, of a coupling of that size."""
        least = math.ceil(self.floor / self.multiple) * self.multiple
        width = max(least, round(n / self.multiple) * self.multiple)
        # All of them is allowed too.
        return size if width >= size or size - n < abs(width - n) else width


def select(
    fn: Callable,
    params: PyTree,
    *args: Any,
    keep: Keep | None = None,
    score: Score | None = None,
    scope: str = "local",
    normalize: str = "mean",
    floor: int = 1,
    multiple: int = 1,
    budget: Budgets = (),
    ignore: tree.Patterns = (),
    approximate: tree.Patterns = (),
    after: Selection | None = None,
) -> Selection:
    """Chooses what `shrink` removes; print the result to see it.

    Args:
        fn: `fn(params, *args)`, as used for evaluation (without dropout).
        params: its weights.
        args: example inputs, or their shapes.
        keep: the fraction of each coupling's indices that stays, by default 0.5. Or
            fractions by pattern: a pattern chooses the couplings of which *all*
            multiplying weights match it, the first match counts, and couplings no
            pattern chooses stay whole. 0 takes a coupling out altogether, for
            residual blocks. With a budget: what stays at least, by default `floor`.
        score: how much each index matters; by default `magnitude(2)`.
        scope: "local" ranks the indices of each coupling, "global" those of all
            couplings that the same pattern of `keep` chose.
        normalize: what makes the scores of couplings comparable for "global": they
            are divided by their mean or their largest, or taken as they are.
        floor: the fewest indices left of any coupling.
        multiple: widths are rounded to multiples of this: 8 suits tensor cores,
            128 TPUs.
        budget: one or several `Budget`: the most the result may cost, or the least it
            must achieve. As little as possible is removed for `at_most`, as much as
            possible for `at_least`.
            Where a limit can be told from shapes, couplings then get indices back one
            by one while it holds.
        ignore: patterns of weights that keep their shapes: what is coupled with any
            dim of them stays whole.
        approximate: patterns of weights whose couplings may shrink even though the
            function does not stay exactly that of the zeroed indices (a two-pass
            norm over them, say). The selection tells the error.
        after: what was chosen in an earlier round, of which `fn` and `params` are
            what it left: fractions then are of what there was before the first
            round, and a round in which nothing leaves is no error.

    Raises:
        ValueError: there is no example input, a fraction is outside [0, 1], a pattern
            matches no weight or chooses nothing, the score says nothing about a
            coupling, a budget can't be met or asks for nothing, or nothing would be
            removed at all.
    """
    if not args:
        raise ValueError(
            "a function is looked at on example inputs, but there are none: write "
            "select(fn, params, x). `jaxeff.functional(model)` makes a function and "
            "its weights of a model object."
        )
    leaves = jax.tree.leaves(params)
    if any(isinstance(w, jax.ShapeDtypeStruct) for w in leaves):
        raise ValueError(
            "which indices stay depends on the values of the weights, but only shapes "
            "are given. Pass arrays; `trace` looks at shapes."
        )
    budgets = as_budgets(budget)
    program = trace(unlift(fn), shapes(params), *args)
    couplings = program.couplings
    widths = Widths(floor, multiple)
    default = 0.0 if budgets else 0.5
    keep = default if keep is None else keep
    chosen = _choose(program, keep, ignore, approximate)
    scores = _scores(score or magnitude(2), program, params)
    _check_scores(scores, chosen, couplings)
    whole = {c.name: c.size for c in couplings}
    if after is not None:
        whole = after.before(couplings)
    pick = lambda rules: _masks(
        scores, rules, whole, scope, normalize, widths, empty=not budgets
    )
    inexact = any(c.inexact for c in couplings if c.name in chosen)

    def selected(amount: float) -> Selection:
        part = {
            n: (1 - amount * (1 - fraction), group)
            for n, (fraction, group) in chosen.items()
        }
        return Selection(couplings, pick(part), inexact, whole=whole)

    def larger(selection: Selection) -> Iterator[tuple[str, Selection]]:
        for name, mask in _larger(selection.keep, scores, normalize, widths):
            keep = {**selection.keep, name: mask}
            yield name, dataclasses.replace(selection, keep=keep)

    if budgets:
        result = search(fn, params, args, selected, larger, budgets)
    else:
        result = selected(1.0)
    if not result.removed and after is None:
        raise ValueError(
            f"nothing would be removed: of {len(chosen)} couplings, the largest with "
            f"{max(c.size for c in couplings if c.name in chosen)} indices, keep, "
            f"floor={floor} and multiple={multiple} leave all. Keep less."
        )
    return result.checked(fn, params, args)


def _masks(
    scores: Scores,
    rules: Mapping[str, tuple[float, int]],
    whole: Mapping[str, int],
    scope: str,
    normalize: str,
    widths: Widths,
    empty: bool,
) -> dict[str, Bool[np.ndarray, " _"]]:
    """For each coupling named, which of its indices stay: the best scored."""
    if scope == "local":
        counts = {n: round(f * whole[n]) for n, (f, _) in rules.items()}
    elif scope == "global":
        counts = _global_counts(scores, rules, whole, normalize)
    else:
        raise ValueError(f'scope is "local" or "global", got {scope!r}.')
    masks = {}
    for name, n in counts.items():
        size = scores[name].size
        gone = empty and rules[name][0] == 0
        n = 0 if gone else widths.nearest(n, size)
        # A stable order: among equals the first stay, on every machine.
        best = np.argsort(-scores[name], kind="stable")[:n]
        masks[name] = np.zeros(size, bool)
        masks[name][best] = True
    return masks


def _larger(
    keep: Mapping[str, Bool[np.ndarray, " _"]],
    scores: Scores,
    normalize: str,
    widths: Widths,
) -> Iterator[tuple[str, Bool[np.ndarray, " _"]]]:
    """Each coupling with the next more indices, where the best lost index is first."""
    lost = {
        name: _comparable(scores[name], normalize)[~mask].max()
        for name, mask in keep.items()
        if not mask.all()
    }
    for name in sorted(lost, key=lambda name: -lost[name]):
        n = widths.next(int(keep[name].sum()), keep[name].size)
        best = np.argsort(-scores[name], kind="stable")[:n]
        mask = np.zeros_like(keep[name])
        mask[best] = True
        yield name, mask


def _comparable(
    values: Float[np.ndarray, " _"], normalize: str
) -> Float[np.ndarray, " _"]:
    units = {"mean": np.mean, "max": np.max, "none": lambda x: 1.0}
    if normalize not in units:
        raise ValueError(f"normalize is one of {', '.join(units)}, got {normalize!r}.")
    # Users' own scores may be below zero.
    return values / max(units[normalize](np.abs(values)), 1e-300)


def _global_counts(
    scores: Scores,
    rules: Mapping[str, tuple[float, int]],
    whole: Mapping[str, int],
    normalize: str,
) -> dict[str, int]:
    """How many of each coupling are among the best of all in its group."""
    counts = {}
    for group in dict.fromkeys(g for _, g in rules.values()):
        names = [n for n, (_, g) in rules.items() if g == group]
        alike = [_comparable(scores[n], normalize) for n in names]
        owner = np.repeat(np.arange(len(names)), [x.size for x in alike])
        values = np.concatenate(alike)
        n = round(rules[names[0]][0] * sum(whole[name] for name in names))
        best = np.argsort(-values, kind="stable")[:n]
        found = np.bincount(owner[best], minlength=len(names))
        counts.update(zip(names, map(int, found), strict=True))
    return counts


def as_budgets(given: Budgets) -> tuple[Budget, ...]:
    """One budget or several, as several.

    Raises:
        ValueError: something else is among them, or two have one name.
    """
    budgets = (given,) if not isinstance(given, Sequence) else tuple(given)
    if wrong := [b for b in budgets if not isinstance(b, Budget)]:
        raise ValueError(
            f"a budget is a figure with its limit, got {wrong[0]!r}: write "
            "pruning.flops(0.5), pruning.parameters(0.5) or a pruning.Budget."
        )
    names = [b.name for b in budgets]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(
            "budgets are told apart by name, but more than one is called "
            f"{', '.join(map(repr, twice))}. Rename one."
        )
    return budgets


def _scores(score: Score, program: Program, params: PyTree) -> Scores:
    wrong = ValueError(
        "a score maps (program, weights) to an array for each coupling, by name, but "
        f"{score!r} does not: write pruning.magnitude(2), pruning.taylor(loss, "
        "batches) or a function of your own."
    )
    try:
        # What takes other arguments is most likely what makes a score.
        inspect.signature(score).bind(program, params)
    except TypeError:
        raise wrong from None
    values = score(program, dense(params))
    if not isinstance(values, Mapping):
        raise wrong
    return {name: np.asarray(x, np.float64) for name, x in values.items()}


def _choose(
    program: Program, keep: Keep, ignore: tree.Patterns, approximate: tree.Patterns
) -> dict[str, tuple[float, int]]:
    """For each coupling to shrink, by name, the fraction to keep, and whose it is."""
    rules = keep if isinstance(keep, Mapping) else {"**": keep}
    check_fractions(rules)
    names = list(program.shapes)
    matched = {pattern: set(tree.match(pattern, names)) for pattern in rules}
    allowed = _allowed(program, ignore, approximate)
    out: dict[str, tuple[float, int]] = {}
    for group, (pattern, fraction) in enumerate(rules.items()):
        hit = _hit(program, allowed, matched[pattern])
        if not hit:
            near = [c for c in program.couplings if _weights(c) & matched[pattern]]
            raise ValueError(
                f"pattern {pattern!r} chooses no coupling: a pattern matches all the "
                "multiplying weights of what it chooses. "
                + _why(program, near, matched[pattern])
            )
        if all(c.name in out for c in hit):
            raise ValueError(
                f"pattern {pattern!r} comes too late: the ones before it chose all of "
                f"its couplings ({', '.join(c.name for c in hit[:4])}), and the first "
                "counts. Put it before them."
            )
        for c in hit:
            out.setdefault(c.name, (float(fraction), group))
    return out


def check_fractions(rules: Mapping[str, Any]) -> None:
    """Refuses what is not a fraction that stays."""
    if not rules:
        raise ValueError("keep names no pattern, so nothing would be removed.")
    for pattern, fraction in rules.items():
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not number or not 0 <= fraction <= 1:
            raise ValueError(
                f"keep is the fraction that stays, in [0, 1], got {fraction!r} for "
                f"{pattern!r}: 0.5 keeps half."
            )


def _allowed(
    program: Program, ignore: tree.Patterns, approximate: tree.Patterns
) -> list[Coupling]:
    """The couplings that may shrink, exactly or as asked for by name."""
    inexact = [c for c in program.couplings if c.inexact]
    allowed = [*program.couplings.free]
    for pattern in [approximate] if isinstance(approximate, str) else approximate:
        matched = set(tree.match(pattern, program.shapes))
        hit = _hit(program, inexact, matched)
        if not hit:
            raise ValueError(
                f"approximate={pattern!r} chooses no coupling that is frozen for "
                f"exactness alone. {_why(program, inexact, matched)}"
            )
        allowed += [c for c in hit if c not in allowed]
    stay = set(tree.match(ignore, program.shapes)) if ignore else set()
    allowed = [c for c in allowed if not _weights(c) & stay]
    if not allowed:
        raise ValueError(
            "nothing in this function can be removed. "
            + _why(program, program.couplings, set())
        )
    return allowed


def _weights(c: Coupling) -> set[str]:
    return {path for path, _ in c.members}


def _hit(
    program: Program, couplings: Sequence[Coupling], matched: set[str]
) -> list[Coupling]:
    """The couplings all of whose multiplying weights are matched."""
    kernels = {site.path for site in program.sites}
    return [
        c
        for c in couplings
        if _weights(c) & matched and _weights(c) & kernels <= matched
    ]


def _check_scores(
    scores: Scores, chosen: Mapping[str, Any], couplings: Couplings
) -> None:
    by_name = {c.name: c for c in couplings}
    for name in chosen:
        c = by_name[name]
        if name not in scores:
            raise ValueError(
                f"the score says nothing about coupling {name} (dim {c.members[0][1]} "
                f"of {c.members[0][0]}). Choose others by pattern, or another score."
            )
        if scores[name].shape != (c.size,) or not np.isfinite(scores[name]).all():
            raise ValueError(
                f"a score gives a finite number for each of the {c.size} indices of "
                f"coupling {name}, got shape {scores[name].shape} with "
                f"{int((~np.isfinite(scores[name])).sum())} not finite."
            )


def _why(program: Program, couplings: Sequence[Coupling], matched: set[str]) -> str:
    """The first few couplings, and what stands against each."""
    kernels = {site.path for site in program.sites}
    said = []
    for c in couplings[:4]:
        others = sorted((_weights(c) & kernels) - matched)
        why = f"it also holds {', '.join(others[:4])}"
        if c.frozen:
            why = f"{c.reason}" + " (`approximate` takes it all the same)" * c.inexact
        path, dim = c.members[0]
        said.append(f"{c.name} (dim {dim} of {path}, size {c.size}): {why}")
    return "; ".join(said or ["There is none"]) + "."
