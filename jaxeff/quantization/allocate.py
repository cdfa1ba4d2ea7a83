"""A format for each weight, under a budget, from what each costs and saves.

`sensitivity` rounds one weight at a time to each format and measures the loss;
`Sensitivity.within` picks formats so that the sum of these losses is small for the
bytes, or the bytes few for the loss. That losses add up is an assumption, good where
they are small; the whole is to be measured again.

Sources: sensitivities: Dong et al. 2019, arXiv:1911.03852 (there from the Hessian);
the choice along the convex hull: Shoham & Gersho 1988, "Efficient bit allocation for
an arbitrary set of quantizers".
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from rich.console import Console
from rich.progress import Progress

from jaxeff import tree
from jaxeff.program import check_batches, check_values, dense, lift, table

from .choice import AnyFormat
from .quantize import apply, check_formats, choose

Loss = Callable[[PyTree, PyTree], Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """One weight in one format.

    Attributes:
        path: of the weight.
        format: None for as it is.
        bytes: stored.
        loss: by which the loss grows if this weight alone is rounded.
    """

    path: str
    format: AnyFormat | None
    bytes: int
    loss: float

    @property
    def name(self) -> str:
        """Of the format."""
        return "as it is" if self.format is None else self.format.name


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What each weight costs and saves in each format. `print` shows the table."""

    options: Mapping[str, tuple[Option, ...]]

    def __str__(self) -> str:
        rows = [
            (o.path, o.name, f"{o.bytes:,}", f"{o.loss:.3g}")
            for options in self.options.values()
            for o in options
        ]
        return table(("weight", "format", "bytes", "loss added"), rows)

    def within(
        self,
        *,
        at_most_bytes: float | int | None = None,
        at_most_loss: float | int | None = None,
    ) -> dict[str, AnyFormat | None]:
        """A format for each weight, to pass as `formats=`.

        Weights go from the smallest formats to finer ones, or from the finest to
        smaller ones, step by step along the convex hull of their options, and the
        steps that save most for what they take of the budget come first. A weight
        whose next step does not fit stays where it is, and the others go on.

        Laws: the budget is kept, and no weight's next step fits what is left of it.
        Until a step does not fit, no choice that takes as little saves more;
        afterwards, one may.

        Args:
            at_most_bytes: of these weights together; loss is saved.
            at_most_loss: of all that rounding adds; bytes are saved.

        Raises:
            ValueError: not one of the two is given; or even the smallest formats take
                more bytes, or the finest ones more loss.
        """
        if (at_most_bytes is None) == (at_most_loss is None):
            raise ValueError(
                "give one budget, at_most_bytes or at_most_loss: the other quantity is "
                "what is saved."
            )
        hulls = {path: _hull(options) for path, options in self.options.items()}
        bytes = sum(h[0].bytes for h in hulls.values())
        loss = sum(h[-1].loss for h in hulls.values())
        if at_most_bytes is not None and bytes > at_most_bytes:
            raise ValueError(
                f"the smallest formats take {bytes:,} bytes, and {at_most_bytes:,.0f} "
                "are allowed. Give smaller formats to choose from."
            )
        if at_most_loss is not None and at_most_loss < 0:
            raise ValueError(
                f"rounding adds a loss of 0 or more in all, and {at_most_loss:.3g} is "
                "allowed. Allow a positive one."
            )
        if at_most_loss is not None and loss > at_most_loss:
            raise ValueError(
                f"the finest formats add a loss of {loss:.3g}, and {at_most_loss:.3g} "
                "is allowed. Give finer formats to choose from, or None for as it is."
            )
        if at_most_bytes is not None:
            chosen = _walk(hulls, at_most_bytes, _bytes, _loss)
        else:
            assert at_most_loss is not None
            finest_first = {path: hull[::-1] for path, hull in hulls.items()}
            chosen = _walk(finest_first, at_most_loss, _loss, _bytes)
        return {path: o.format for path, o in chosen.items()}


_bytes = lambda o: o.bytes
_loss = lambda o: o.loss


def _walk(
    ways: Mapping[str, Sequence[Option]],
    budget: float | int,
    taken: Callable[[Option], float | int],
    saved: Callable[[Option], float | int],
) -> dict[str, Option]:
    """Goes along all ways, best bargains first, and stops on each that gets too dear.

    Args:
        ways: for each weight options of which each takes more of the budget than that
            before it, and has less of what is to be saved.
        budget: of all together; the first options fit it.
        taken, saved: the two quantities.
    """
    steps = sorted(
        ((saved(b) - saved(a)) / (taken(b) - taken(a)), path)
        for path, way in ways.items()
        for a, b in zip(way, way[1:], strict=False)
    )
    at, closed = dict.fromkeys(ways, 0), set()
    for _, path in steps:
        if path in closed:
            continue
        at[path] += 1
        # Summed anew: differences of floats added up could pass the budget by a hair.
        if sum(taken(way[at[p]]) for p, way in ways.items()) > budget:
            at[path] -= 1
            closed.add(path)
    return {path: way[at[path]] for path, way in ways.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those that no mixture of others beats, from the fewest bytes on."""
    hull: list[Option] = []
    for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if hull and o.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], o):
            hull.pop()
        if hull and hull[-1].bytes == o.bytes:
            hull.pop()
        hull.append(o)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / max(1, b.bytes - a.bytes)


def sensitivity(
    fn: Callable,
    params: PyTree,
    *args: Any,
    formats: AnyFormat | Sequence[AnyFormat | None],
    batches: Iterable[tuple],
    loss: Loss | None = None,
    only: tree.Patterns = "**",
    fit: str = "mse",
    progress: bool = True,
) -> Sensitivity:
    """Measures what rounding each weight alone does to the outputs.

    Activations are left as they are, whatever the formats say of them. One program is
    compiled; it runs once for each weight, format and batch.

    Args:
        fn, params, args: as for `quantize`.
        formats: one or several to choose from; None is among them for a weight that
            may stay.
        batches: tuples of arguments to measure with.
        loss: `loss(outputs, exact)` -> a number, of the outputs with one weight rounded
            and those with none; by default the squared difference over the squared
            size. (A loss of the task ignores `exact`.) What is measured with no weight
            rounded is subtracted.
        only: patterns of the weights to choose formats for.
        fit: how scales are found, see `quantize`.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: there is no format or no batch, or a batch is no tuple; the weights
            have no values; a pattern matches no weight, or none that can be rounded;
            by default, no output is a floating-point array.
    """
    given = list(batches)
    formats = [formats] if isinstance(formats, AnyFormat) else list(formats)
    real = [f for f in formats if f is not None]
    if not real or not given:
        raise ValueError(
            f"sensitivities are measured with formats and with data, got {len(real)} "
            f"formats and {len(given)} batches."
        )
    check_batches(given)
    check_values(params, "sensitivity")
    for f in real:
        check_formats(f)
    loss = _relative if loss is None else loss
    plain = lift(fn)
    exact = [jax.jit(plain)(params, *batch) for batch in given]
    measure = jax.jit(lambda params, batch, y: _one(loss(plain(params, *batch), y)))
    total = lambda params: (
        sum(float(measure(params, b, y)) for b, y in zip(given, exact, strict=True))
        / len(given)
    )
    base = total(params)
    patterns = [only] if isinstance(only, str) else list(only)
    weights = tree.paths(params)
    found: dict[str, list[Option]] = {}
    every = [choose(fn, params, args, dict.fromkeys(patterns, f)) for f in real]
    jobs = [c for choices in every for c in choices if c.format is not None]
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=len(jobs))
        for c in jobs:
            bar.update(task, description=c.path)
            w = weights[c.path]
            (q,) = apply([w], [c], fit=fit)
            new = tree.replaced(params, {c.path: dense(q)})
            added = total(new) - base
            option = Option(c.path, c.format, tree.tree_bytes(q), added)
            found.setdefault(c.path, []).append(option)
            bar.advance(task)
    if None in formats:
        for path in found:
            size = tree.tree_bytes(weights[path])
            found[path].append(Option(path, None, size, 0.0))
    return Sensitivity({path: tuple(options) for path, options in found.items()})


def _one(value: Any) -> Any:
    if jnp.shape(value):
        raise ValueError(
            f"a loss is one number, and this one has the shape {jnp.shape(value)}. "
            "Take its mean or its sum."
        )
    return value


def _relative(outputs: PyTree, exact: PyTree) -> Any:
    off = lambda a, b: jnp.sum((a - b).astype(jnp.float32) ** 2)
    size = lambda a: jnp.sum(a.astype(jnp.float32) ** 2)
    pairs = zip(*map(jax.tree.leaves, (outputs, exact)), strict=True)
    floats = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    if not floats:
        raise ValueError(
            "rounding is measured by its change of floating-point outputs, and the "
            "function returns none. Leave out what makes them integers, or give "
            "`loss=`."
        )
    return sum(off(a, b) for a, b in floats) / sum(size(b) for _, b in floats)
