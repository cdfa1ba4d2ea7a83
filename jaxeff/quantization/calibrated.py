"""Rounding a trained model with calibration data, weight after weight.

Each weight sees what the weights rounded before it compute, and is rounded so that
its outputs change least. What an algorithm does to one matrix is in a file of its
own.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxeff.program import check_batches, check_values

from .adaround import adaround_matrix
from .fitting import fit_weights, Job, Task, why_unfitted
from .formats import Format
from .gptq import gptq_groups, gptq_matrix
from .gptq_codes import gptq_codes
from .log import Log
from .quantize import check_fit, check_formats, choose, Formats, quantize
from .rescale import rescale_by_error
from .scales import Scales

_DAMPING = 0.01


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
    damping: float = _DAMPING,
    drift: bool = False,
    resume: str | Path | None = None,
    log: Log | None = None,
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
        drift: aim at the outputs of the model as it was, not at those of the weight
            for inputs that have drifted since; it takes a second run of the model.
        resume: a folder that remembers each weight that is done, so that a second run
            with the same arguments goes on where the first was stopped. It may be
            deleted once the result is saved.
        log: collects format, errors and time of each weight.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize` and `program.calibrate`; `block` is below 1,
            `damping` not above 0, or groups that are not static meet a format whose
            scales are not one float32 for a run of inputs; or `resume` holds parts
            of another run.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3; activation order and
    static groups: its authors' later code; codebooks: van Baalen et al. 2024,
    arXiv:2402.15319.
    """
    _check_fit(fit)
    check_values(params, "gptq")
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
    kept = {**options, "static_groups": static_groups, "drift": drift}
    job = Job("gptq", kept, rounded, encode, damping if drift else None)
    given = {"fit": fit, "resume": resume, "log": log, "progress": progress}
    data = check_batches(batches)
    return fit_weights(fn, params, args, data, formats, job, **given)


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
    drift: bool = False,
    resume: str | Path | None = None,
    log: Log | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Rounds each weight up or down, whichever a few steps of training find better.

    Needs a matrix of (inputs, inputs) for one weight at a time; each step takes a
    product with it.

    Args:
        fn, params, args, formats: as for `quantize`.
        batches, fit, drift, resume, log, progress: as for `gptq`.
        steps, learning_rate, penalty: see `adaround.adaround_matrix`.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize` and `program.calibrate`; there is no step.

    Source: Nagel et al. 2020, arXiv:2004.10568.
    """
    _check_fit(fit)
    check_values(params, "adaround")
    if steps < 1:
        raise ValueError(f"rounding is learned in 1 step or more, got {steps}.")

    def rounded(at: Task, w: Array, h: Array) -> tuple[Array, Scales]:
        return at.rounded(functools.partial(adaround_matrix, **options), w, h, fit)

    options = {"steps": steps, "learning_rate": learning_rate, "penalty": penalty}
    kept = {**options, "drift": drift}
    job = Job("adaround", kept, rounded, drift=_DAMPING if drift else None)
    given = {"fit": fit, "resume": resume, "log": log, "progress": progress}
    data = check_batches(batches)
    return fit_weights(fn, params, args, data, formats, job, **given)


def awq(
    fn: Callable,
    params: PyTree,
    *args: Any,
    batches: Iterable[tuple],
    formats: Formats | None = None,
    fit: str = "mse",
    steps: int = 20,
    log: Log | None = None,
    progress: bool = True,
) -> tuple[Callable, PyTree]:
    """Makes room for the inputs that matter before weights are rounded to the nearest.

    Weights that meet large inputs are multiplied by s > 1, and what makes these
    inputs divided: their rounding errors shrink by as much. That is done wherever it
    leaves the function as it is (see `program.scalings`); weights of other inputs are
    rounded as they are.

    Args:
        fn, params, args, formats: as for `quantize`.
        batches, log, progress: as for `gptq`.
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
    check_values(params, "awq")
    choices = choose(fn, params, args, formats)
    check_fit(fit, choices)
    given = check_batches(batches)
    known = {c.path: c.format for c in choices if isinstance(c.format, Format)}
    scaled = rescale_by_error(
        fn, params, args, given, known, steps=steps, fit=fit, progress=progress
    )
    return quantize(
        fn,
        scaled,
        *args,
        formats=formats,
        fit=fit,
        batches=given,
        log=log,
        progress=progress,
    )


def unfitted(
    fn: Callable, params: PyTree, *args: Any, formats: Formats | None = None
) -> dict[str, str]:
    """For each weight that GPTQ cannot fit, so that it is rounded to the nearest, why.

    AdaRound leaves those with codebooks as well.

    Args:
        fn, params, args, formats: as for `quantize`; shapes will do.
    """
    choices = choose(fn, params, args, formats)
    return why_unfitted(fn, params, args, choices, codes=True)


def _check_fit(fit: str) -> None:
    if fit not in ("absmax", "mse"):
        raise ValueError(
            f"scales are found beforehand by 'absmax' or 'mse', got {fit!r}: others "
            "are for `quantize`."
        )


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
