"""Rounding a trained model with calibration data, weight after weight.

Each weight sees what the weights rounded before it compute, and is rounded so that
its outputs change least. What an algorithm does to one matrix is in a file of its
own.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import (
    calibrate,
    dense,
    find_uses,
    gram,
    lift,
    Memory,
    Part,
    relative_error,
)

from . import scales as scaling
from .adaround import adaround_matrix
from .choice import AnyFormat, Choice
from .codebook import Codebook
from .coding import Coding, Encode
from .drift import grams, undrifted
from .formats import Format
from .gptq import gptq_groups, gptq_matrix
from .gptq_codes import gptq_codes
from .importance import importances
from .log import errors, Log
from .places import Place, place
from .quantize import apply, check_formats, choose, Formats, quantize, round_weight
from .ranges import activation_scales
from .rescale import rescale_by_error
from .scales import Scales
from .vector import VectorArray

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
    return _rounded(fn, params, args, batches, formats, fit, job, resume, log, progress)


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
    if steps < 1:
        raise ValueError(f"rounding is learned in 1 step or more, got {steps}.")

    def rounded(at: Task, w: Array, h: Array) -> tuple[Array, Scales]:
        return at.rounded(functools.partial(adaround_matrix, **options), w, h, fit)

    options = {"steps": steps, "learning_rate": learning_rate, "penalty": penalty}
    kept = {**options, "drift": drift}
    job = Job("adaround", kept, rounded, drift=_DAMPING if drift else None)
    return _rounded(fn, params, args, batches, formats, fit, job, resume, log, progress)


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
    choices = choose(fn, params, args, formats)
    given = list(batches)
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


class Job(NamedTuple):
    """An algorithm that rounds matrices.

    Attributes:
        name: of it.
        options: that its results depend on.
        round: maps a task, the matrices, and x^T x of their inputs to matrices on
            the grid and the scales of the window.
        encode: the same for a matrix under codebooks; None: it cannot.
        drift: the damping with which it aims at the outputs of the model as it was;
            None: it does not.
    """

    name: str
    options: dict[str, Any]
    round: Callable[["Task", Array, Array], tuple[Array, Scales]]
    encode: Encode | None = None
    drift: float | None = None


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
    job: Job,
    resume: str | Path | None,
    log: Log | None,
    progress: bool,
) -> tuple[Callable, PyTree]:
    """Applies an algorithm to the matrices of weights, and `quantize` to the rest."""
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    given = list(batches)
    left = _unfitted(fn, params, args, choices, codes=job.encode is not None)
    found = [c for c in choices if c.format is not None and c.path not in left]
    memory = None
    if resume is not None:
        asked = [(c.path, str(c.format)) for c in found]
        memory = Memory(resume, (job.name, job.options, fit, asked, params, given))
    weights = tree.paths(params)
    rounding = _Rounding({c.path: c for c in found}, weights, fit, job, log)
    coded = [c for c in found if isinstance(c.format, Codebook)]
    importance = {}
    if fit == "mse" and coded:
        importance = importances(fn, params, args, given, coded, progress)
    for c in coded:
        books = round_weight(weights[c.path], c, importance=importance.get(c.path))
        rounding.codings[c.path] = Coding(c.path, books)
    # What no data tells of is rounded first, so that the others make up for it.
    nearest = {}
    for c in choices:
        if c.path in left and c.format is not None:
            q = nearest[c.path] = round_weight(weights[c.path], c, fit)
            if log is not None:
                error = relative_error(weights[c.path], q)
                log.add(c.path, 0, c.format.name, error or 0.0)
    params = tree.replaced(params, {path: dense(q) for path, q in nearest.items()})
    new = calibrate(
        fn,
        params,
        given,
        weights=[c.path for c in found],
        statistic=gram if job.drift is None else grams,
        compare=job.drift is not None,
        update=rounding.update,
        memory=memory,
        restore=rounding.restore,
        progress=progress,
    )
    x_scales = activation_scales(fn, params, given, choices)
    stored = rounding.coded() | nearest
    scales = rounding.scales
    new = apply(new, choices, scales=scales, stored=stored, x_scales=x_scales)
    return lift(fn), new


class _Rounding:
    """The scales and the codes of weights, part by part."""

    def __init__(
        self,
        choices: dict[str, Choice],
        weights: dict[str, Any],
        fit: str,
        job: Job,
        log: Log | None,
    ):
        self.choices, self.weights = choices, weights
        self.fit, self.job, self.log = fit, job, log
        self.scales: dict[str, Scales] = {}
        self.codings: dict[str, Coding] = {}

    def update(self, part: Part, w: Array, h: Any) -> tuple[Array, dict[str, Array]]:
        """Rounds a part; returns it, and what is to be remembered beside it."""
        old = w
        if self.job.drift is not None:
            h, mixed = h
            w = undrifted(w, h, mixed, self.job.drift)
        if part.path in self.codings:
            assert self.job.encode is not None
            coding = self.codings[part.path]
            new, codes = coding.encode(part, w, h, self.job.encode)
            coding.put(part, codes)
            beside = {"codes": codes}
        else:
            task = self._task(part)
            new, found = self.job.round(task, w, h)
            self._put(part, task, found)
            # Scales of 8 bits are exact in float32, which any file can hold.
            held = {k: x for k, x in found._asdict().items() if x is not None}
            beside = {name: x.astype(jnp.float32) for name, x in held.items()}
        if self.log is not None:
            error, output_error = map(float, errors(old, new, h))
            name = self._format(part).name
            self.log.add(part.path, part.index, name, error, output_error)
        return new, beside

    def restore(self, part: Part, beside: dict[str, Any]) -> None:
        """Takes what was remembered of a part."""
        if part.path in self.codings:
            self.codings[part.path].put(part, jnp.asarray(beside["codes"]))
            return
        found = Scales(**{name: jnp.asarray(x) for name, x in beside.items()})
        self._put(part, self._task(part), found)

    def coded(self) -> dict[str, VectorArray]:
        """The weights under codebooks, by path."""
        return {path: coding.stored() for path, coding in self.codings.items()}

    def _format(self, part: Part) -> AnyFormat:
        fmt = self.choices[part.path].format
        assert fmt is not None
        return fmt

    def _task(self, part: Part) -> Task:
        c, format = self.choices[part.path], self._format(part)
        assert isinstance(format, Format)
        weight = jnp.asarray(self.weights[part.path])
        shared = format.blocks(weight.shape, c.contract, c.batch)
        if part.path not in self.scales:
            self.scales[part.path] = scaling.fit(weight, format, shared, c.batch)
        return Task(format, place(part, weight.shape, shared, c.batch), weight)

    def _put(self, part: Part, task: Task, found: Scales) -> None:
        self.scales[part.path] = task.place.put(self.scales[part.path], found)


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
