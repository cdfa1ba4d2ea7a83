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
from jaxeff.program import dense, lift, table

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

        Args:
            at_most_bytes: of these weights together; the least loss for it.
            at_most_loss: of all that rounding adds; the fewest bytes for it.

        Raises:
            ValueError: not one of the two is given; or even the smallest formats take
                more bytes, or the finest ones more loss.
        """
        if (at_most_bytes is None) == (at_most_loss is None):
            raise ValueError(
                "give one budget, at_most_bytes or at_most_loss: the other one is made "
                "as small as it can be."
            )
        hulls = {path: _hull(options) for path, options in self.options.items()}
        at = dict.fromkeys(hulls, 0)  # each as small as it gets
        # Each step buys some loss for some bytes: the best bargains come first.
        steps = sorted(
            (
                ((b.loss - a.loss) / (b.bytes - a.bytes), path)
                for path, hull in hulls.items()
                for a, b in zip(hull, hull[1:], strict=False)
            ),
        )
        bytes = sum(h[0].bytes for h in hulls.values())
        loss = sum(h[0].loss for h in hulls.values())
        if at_most_bytes is not None and bytes > at_most_bytes:
            raise ValueError(
                f"the smallest formats take {bytes:,} bytes, and {at_most_bytes:,.0f} "
                "are allowed. Give smaller formats to choose from."
            )
        for _, path in steps:
            a, b = hulls[path][at[path]], hulls[path][at[path] + 1]
            if at_most_loss is not None and loss <= at_most_loss:
                break
            if at_most_bytes is not None and bytes + b.bytes - a.bytes > at_most_bytes:
                break
            at[path] += 1
            bytes, loss = bytes + b.bytes - a.bytes, loss + b.loss - a.loss
        if at_most_loss is not None and loss > at_most_loss:
            raise ValueError(
                f"the finest formats add a loss of {loss:.3g}, and {at_most_loss:.3g} "
                "is allowed. Give finer formats to choose from, or None for as it is."
            )
        return {path: hull[at[path]].format for path, hull in hulls.items()}


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
    formats: Sequence[AnyFormat | None],
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
        formats: to choose from; None is among them for a weight that may stay.
        batches: tuples of arguments to measure with.
        loss: `loss(outputs, exact)` -> a number, of the outputs with one weight rounded
            and those with none; by default the squared difference over the squared
            size. (A loss of the task ignores `exact`.) What is measured with no weight
            rounded is subtracted.
        only: patterns of the weights to choose formats for.
        fit: how scales are found, see `quantize`.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: there is no format or no batch; a pattern matches no weight, or
            none that can be rounded.
    """
    given = list(batches)
    real = [f for f in formats if f is not None]
    if not real or not given:
        raise ValueError(
            f"sensitivities are measured with formats and with data, got {len(real)} "
            f"formats and {len(given)} batches."
        )
    for f in real:
        check_formats(f)
    loss = _relative if loss is None else loss
    plain = lift(fn)
    exact = [jax.jit(plain)(params, *batch) for batch in given]
    measure = jax.jit(lambda params, batch, y: loss(plain(params, *batch), y))
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


def _relative(outputs: PyTree, exact: PyTree) -> Any:
    off = lambda a, b: jnp.sum((a - b).astype(jnp.float32) ** 2)
    size = lambda a: jnp.sum(a.astype(jnp.float32) ** 2)
    pairs = zip(*map(jax.tree.leaves, (outputs, exact)), strict=True)
    floats = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(off(a, b) for a, b in floats) / sum(size(b) for _, b in floats)
