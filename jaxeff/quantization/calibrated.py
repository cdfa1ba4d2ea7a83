"""Rounding a trained model with calibration data, weight after weight.

Each weight sees what the weights rounded before it compute, and is rounded so that
its outputs change least. What an algorithm does to one matrix is in a file of its
own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import calibrate, find_uses, gram, lift

from . import scales as scaling
from .adaround import adaround_matrix
from .choice import Choice
from .codebook import Codebook
from .coding import Coding, Encode
from .formats import Format
from .gptq import gptq_groups, gptq_matrix
from .gptq_codes import gptq_codes
from .importance import importances
from .places import Place, place
from .quantize import apply, check_formats, choose, Formats, learned, quantize
from .ranges import activation_scales
from .rescale import rescale_by_error
from .scales import Scales


def gptq(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    formats: Formats | None = None,
    fit: str = "mse",
    activation_order: bool = True,
    static_groups: bool = True,
    block: int = 128,
    damping: float = 0.01,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Rounds weights one input after another; later inputs make up for each error.

    Needs a matrix of (inputs, inputs) for one weight at a time, and time cubic in the
    inputs. Codebooks are learned beforehand, as `quantize` does, and each code is then
    the one whose error costs least. Weights that no statistic can be taken of
    (look-ups, those used in a `while`) are rounded to the nearest; `unfitted` says
    which, and why.

    Args:
        fn, params, args, formats: as for `quantize`.
        batches: tuples of arguments to calibrate with, all of the same shapes.
        fit: how the scale of a block is found: "absmax", or "mse", by the least
            squared error where each input counts by its mean square. Codebooks are
            learned from the weights alone, or with each input counting so.
        activation_order: take the inputs with the largest mean square first.
        static_groups: find all scales before anything is rounded. If not, that of a
            group is found when its first input is reached, from weights that have
            made up for the errors before; the inputs then keep their order.
        block: inputs whose errors are passed on together; time, not results,
            depends on it.
        damping: times the mean squared input is added to each squared input; more
            of it trusts few data less.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize` and `program.calibrate`; `block` is below 1,
            `damping` not above 0, or groups that are not static meet a format whose
            scales are not one float32 for a run of inputs.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3; activation order and
    static groups: its authors' later code; codebooks: van Baalen et al. 2024,
    arXiv:2402.15319.
    """
    if block < 1 or not damping > 0:
        raise ValueError(
            f"block counts columns and damping keeps the inverse finite, so block >= 1 "
            f"and damping > 0, got {block} and {damping}: the paper takes 128 and 0.01."
        )

    def rounded(at: Task, w: Array, h: Array) -> tuple[Array, Scales]:
        group = at.format.group
        if not static_groups and group is not None:
            return _in_groups(at, group, w, h, fit=fit, block=block, damping=damping)
        return at.rounded(functools.partial(gptq_matrix, **options), w, h, fit)

    options = {"activation_order": activation_order, "block": block, "damping": damping}
    encode = functools.partial(gptq_codes, **options)
    return _rounded(fn, params, args, batches, formats, fit, progress, rounded, encode)


def adaround(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    formats: Formats | None = None,
    fit: str = "mse",
    steps: int = 2000,
    learning_rate: float = 1e-2,
    penalty: float = 1.0,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Rounds each weight up or down, whichever a few steps of training find better.

    Needs a matrix of (inputs, inputs) for one weight at a time; each step takes a
    product with it.

    Args:
        fn, params, args, formats: as for `quantize`.
        batches, fit, progress: as for `gptq`.
        steps, learning_rate, penalty: see `adaround.adaround_matrix`.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize` and `program.calibrate`; there is no step.

    Source: Nagel et al. 2020, arXiv:2004.10568.
    """
    if steps < 1:
        raise ValueError(f"rounding is learned in 1 step or more, got {steps}.")

    def rounded(at: Task, w: Array, h: Array) -> tuple[Array, Scales]:
        options = {"learning_rate": learning_rate, "penalty": penalty}
        one = functools.partial(adaround_matrix, steps=steps, **options)
        return at.rounded(one, w, h, fit)

    return _rounded(fn, params, args, batches, formats, fit, progress, rounded)


def awq(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    formats: Formats | None = None,
    fit: str = "mse",
    steps: int = 20,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Makes room for the inputs that matter before weights are rounded to the nearest.

    Weights that meet large inputs are multiplied by s > 1, and what makes these
    inputs divided: their rounding errors shrink by as much. That is done wherever it
    leaves the function as it is (see `program.scalings`); weights of other inputs are
    rounded as they are.

    Args:
        fn, params, args, formats: as for `quantize`.
        batches, progress: as for `gptq`.
        fit: "absmax", "mse" or "hqq", see `quantize`.
        steps: powers of the inputs' sizes that are tried for s.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize` and `program.calibrate`; nothing is tried, or no
            weight reads what can be scaled where it is made.

    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2.
    """
    if steps < 1:
        raise ValueError(f"1 power or more is tried, got {steps}.")
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    given = list(batches)
    known = {c.path: c.format for c in choices if isinstance(c.format, Format)}
    scaled = rescale_by_error(
        fn, params, args, given, known, steps=steps, fit=fit, progress=progress
    )
    return quantize(
        fn, scaled, *args, formats=formats, fit=fit, batches=given, progress=progress
    )


class Task(NamedTuple):
    """A part of a weight that is to be rounded.

    Attributes:
        format: for it.
        place: of the part in the weight.
        weight: all of it, as it was.
    """

    format: Format
    place: Place
    weight: Array

    def rounded(
        self,
        one: Callable[..., Array],
        w: Float[Array, "groups rows cols"],
        h: Float[Array, "groups cols cols"],
        fit: str,
    ) -> tuple[Array, Scales]:
        """The matrices, each rounded under scales found beforehand; and these.

        For "mse" each input counts by its mean square.
        """
        squares = jnp.diagonal(h, axis1=1, axis2=2)[:, None]
        found = self.place.fit(self.weight, self.format, fit, squares)
        zero = found.zero
        if zero is not None:
            zero = self.place.matrices(zero).astype(jnp.float32)
        scale = self.place.matrices(scaling.real(found))
        run = functools.partial(one, grid=self.format.grid)
        return jax.vmap(run)(w, h, scale, zero), found


def _rounded(
    fn: Callable,
    params: PyTree,
    args: tuple,
    batches: Iterable[tuple],
    formats: Formats | None,
    fit: str,
    progress: bool,
    algorithm: Callable[[Task, Array, Array], tuple[Array, Scales]],
    encode: Encode | None = None,
) -> tuple[Callable, PyTree]:
    """Applies an algorithm to the matrices of each weight, and `quantize` to the rest.

    Args:
        algorithm: maps a task, the matrices, and x^T x of their inputs to matrices on
            the grid and the scales of the window.
        encode: the same for a matrix under codebooks; None: it cannot.
    """
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    given = list(batches)
    left = _unfitted(fn, params, args, choices, codes=encode is not None)
    found = [c for c in choices if c.format is not None and c.path not in left]
    todo = {c.path: (c, c.format) for c in found if isinstance(c.format, Format)}
    coded = [c for c in found if isinstance(c.format, Codebook)]
    weights, scales = tree.paths(params), dict[str, Scales]()
    importance = {}
    if fit == "mse" and coded:
        importance = importances(fn, params, args, given, coded, progress)
    codings = {
        c.path: Coding(c.path, learned(weights[c.path], c, importance.get(c.path)))
        for c in coded
    }

    def update(part, w, h):
        if part.path in codings:
            assert encode is not None
            return codings[part.path].encode(part, w, h, encode)
        (c, format), weight = todo[part.path], jnp.asarray(weights[part.path])
        shared = format.blocks(weight.shape, c.contract, c.batch)
        if part.path not in scales:
            scales[part.path] = scaling.fit(weight, format, shared, c.batch)
        here = place(part, weight.shape, shared, c.batch)
        new, found = algorithm(Task(format, here, weight), w, h)
        scales[part.path] = here.put(scales[part.path], found)
        return new

    new = calibrate(
        fn,
        params,
        given,
        weights=[c.path for c in found],
        statistic=gram,
        update=update,
        progress=progress,
    )
    x_scales = activation_scales(fn, params, given, choices)
    stored = {path: coding.stored() for path, coding in codings.items()}
    given = {"scales": scales, "x_scales": x_scales, "stored": stored}
    return lift(fn), apply(new, choices, fit=fit, **given)


def unfitted(
    fn: Callable, params: PyTree, *args: Any, formats: Formats | None = None
) -> dict[str, str]:
    """For each weight that GPTQ cannot fit, so that it is rounded to the nearest, why.

    AdaRound leaves those with codebooks as well.

    Args:
        fn, params, args, formats: as for `quantize`; shapes will do.
    """
    choices = choose(fn, params, args, formats)
    return _unfitted(fn, params, args, choices, codes=True)


def _unfitted(
    fn: Callable, params: PyTree, args: tuple, choices: list[Choice], *, codes: bool
) -> dict[str, str]:
    candidates = find_uses(fn, params, args).candidates
    found = {}
    for c in choices:
        if c.format is None:
            continue
        candidate = candidates[c.weight]
        if not (codes or isinstance(c.format, Format)):
            found[c.path] = "its codebooks are learned by k-means"
        elif candidate.reason or candidate.looked_up:
            why = "rows of it are looked up too, of which no statistic tells"
            found[c.path] = candidate.reason or why
    return found


def _in_groups(
    at: Task,
    group: int,
    w: Array,
    h: Array,
    *,
    fit: str,
    block: int,
    damping: float,
) -> tuple[Array, Scales]:
    """GPTQ with scales that are found on the way."""
    starts = at.place.group_starts(group)
    if at.format.outputs != 1 or at.format.scale != "float32" or starts is None:
        raise ValueError(
            f"groups can be scaled one after another where each is a run of inputs of "
            f"one output with a float32 scale, which those of {at.format.name} are not "
            "here. Leave static_groups=True."
        )
    one = lambda w, h: gptq_groups(
        w, h, format=at.format, block=block, damping=damping, method=fit
    )
    new, found = jax.vmap(one)(w, h)
    return new, jax.tree.map(lambda x: at.place.blocks_at(starts, x), found)
