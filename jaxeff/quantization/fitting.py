"""Fits the weights of a function to data, part by part, by one algorithm.

Each part sees what those before it, rounded, compute. What an algorithm does to the
matrices of a part is for a `Job` to say; where these lie among the scales and the
codes of the weight is for `places.py` and `coding.py`.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxeff.program import (
    calibrate,
    dense,
    find_uses,
    gram,
    lift,
    Memory,
    opened,
    Part,
    relative_error,
)

from . import scales as scaling
from .choice import AnyFormat, Choice
from .codebook import Codebook
from .coding import Coding, Encode
from .drift import grams, undrifted
from .formats import Format
from .importance import importances
from .log import errors, Log
from .places import Place, place
from .quantize import apply, check_formats, choose, Formats, is_quantized, round_weight
from .ranges import activation_scales
from .scales import Scales
from .vector import VectorArray


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
        scales: of the window.
        done: for each block of the window whether its scale is settled: a part
            before this one was rounded with it.
    """

    format: Format
    place: Place
    weight: Array
    scales: Scales
    done: Array

    def fit(self, method: str, importance: Array) -> Scales:
        """The scales of the window, settled ones as they are."""
        known = self.scales
        new = self.place.fit(
            self.weight, self.format, method, importance, outer=known.outer
        )

        def pick(new: Array, old: Array) -> Array:
            # JAX selects among numbers of 8 bits by way of wider ones.
            old, wide = old.astype(jnp.float32), new.astype(jnp.float32)
            return jnp.where(self.done, old, wide).astype(new.dtype)

        return Scales(
            pick(new.scale, known.scale),
            known.outer,
            jax.tree.map(pick, new.zero, known.zero),  # if there is one
        )

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
        found = self.fit(fit, squares)
        zero = found.zero
        if zero is not None:
            zero = self.place.matrices(zero).astype(jnp.float32)
        scale = self.place.matrices(scaling.real(found))
        run = functools.partial(one, grid=self.format.grid)
        return jax.vmap(run)(w, h, scale, zero), found


def fit_weights(
    fn: Callable,
    params: PyTree,
    args: tuple,
    batches: Iterable[tuple],
    formats: Formats | None,
    job: Job,
    *,
    fit: str,
    resume: str | Path | None,
    log: Log | None,
    progress: bool,
) -> tuple[Callable, PyTree]:
    """Applies an algorithm to the matrices of weights, and `quantize` to the rest.

    Args:
        fn, params, args, batches, formats, fit, resume, log, progress: as for `gptq`.
        job: the algorithm.
    """
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    given = list(batches)
    asked = [(c.path, str(c.format)) for c in choices if c.format is not None]
    memory = Memory.at(resume, fn, params, given, job.name, job.options, fit, asked)
    # Parts of weights that were rotated or factored are weights themselves.
    plain_fn, weights, close = opened(fn, params, is_quantized)
    left = _unfitted(plain_fn, weights, args, choices, codes=job.encode is not None)
    found = [c for c in choices if c.format is not None and c.path not in left]

    @functools.cache
    def importance() -> dict[str, Array]:
        coded = [c for c in found if isinstance(c.format, Codebook)]
        if fit != "mse":
            return {}
        return importances(plain_fn, weights, args, given, coded, progress)

    rounding = Fitting({c.path: c for c in found}, weights, fit, job, log, importance)
    # What no data tells of is rounded first, so that the others make up for it.
    nearest = {}
    for c in choices:
        if c.path in left and c.format is not None:
            q = nearest[c.path] = round_weight(weights[c.path], c, fit)
            if log is not None:
                error = relative_error(weights[c.path], q)
                log.add(c.path, 0, c.format.name, error)
    begin = weights | {path: dense(q) for path, q in nearest.items()}
    new = calibrate(
        plain_fn,
        begin,
        given,
        weights=[c.path for c in found],
        statistic=gram if job.drift is None else grams,
        compare=None if job.drift is None else weights,
        update=rounding.update,
        memory=memory,
        restore=rounding.restore,
        progress=progress,
    )
    x_scales = activation_scales(plain_fn, begin, given, choices)
    stored = rounding.coded() | nearest
    known = {"scales": rounding.scales, "stored": stored, "x_scales": x_scales}
    return lift(fn), apply(close(new), choices, **known)


class Fitting:
    """The scales and the codes of weights, part by part."""

    def __init__(
        self,
        choices: dict[str, Choice],
        weights: dict[str, Any],
        fit: str,
        job: Job,
        log: Log | None,
        importance: Callable[[], dict[str, Array]],
    ):
        self.choices, self.weights = choices, weights
        self.fit, self.job, self.log, self.importance = fit, job, log, importance
        self.scales: dict[str, Scales] = {}
        self.done: dict[str, Array] = {}  # for each scale whether a part has it
        self.codings: dict[str, Coding] = {}

    def update(self, part: Part, w: Array, h: Any) -> tuple[Array, dict[str, Array]]:
        """Rounds a part; returns it, and what is to be remembered beside it."""
        old = w
        if self.job.drift is not None:
            h, mixed = h
            w = undrifted(w, h, mixed, self.job.drift)
        choice = self.choices[part.path]
        if isinstance(choice.format, Codebook):
            assert self.job.encode is not None
            coding = self._coding(choice)
            new, codes = coding.encode(part, w, h, self.job.encode)
            coding.put(part, codes)
            beside = {"codes": codes, **coding.books()}
        else:
            task = self._task(part)
            if self.job.drift is not None:  # the scales are those of what is rounded
                task = task._replace(weight=_with(task.weight, part, w))
            new, found = self.job.round(task, w, h)
            self._put(part, task, found)
            # Scales of 8 bits are exact in float32, which any file can hold.
            held = {k: x for k, x in found._asdict().items() if x is not None}
            beside = {name: x.astype(jnp.float32) for name, x in held.items()}
        if not jnp.isfinite(new).all():
            raise ValueError(
                f"{self.job.name} gave {part.path} numbers that are not finite, from "
                f"weights that are: x^T x of its {w.shape[-1]} inputs has no inverse. "
                "Give more data, or for GPTQ more damping (0.01 in the paper)."
            )
        off = errors(old, new, h)
        self._tell(part, *map(float, off))
        return new, {**beside, "errors": jnp.stack(off)}

    def restore(self, part: Part, beside: dict[str, Any]) -> None:
        """Takes what was remembered of a part."""
        self._tell(part, *map(float, beside.pop("errors")))
        arrays = {name: jnp.asarray(x) for name, x in beside.items()}
        choice = self.choices[part.path]
        if isinstance(choice.format, Codebook):
            codes = arrays.pop("codes")
            if part.path not in self.codings:
                shape = _shape(self.weights[part.path])
                learned = Coding.known(round_weight(shape, choice), arrays)
                self.codings[part.path] = Coding(part.path, learned)
            self.codings[part.path].put(part, codes)
            return
        self._put(part, self._task(part), Scales(**arrays))

    def _tell(self, part: Part, error: float, output_error: float) -> None:
        if self.log is not None:
            name = self._format(part).name
            self.log.add(part.path, part.index, name, error, output_error)

    def _coding(self, choice: Choice) -> Coding:
        """Under codebooks that are learned when they are first asked for."""
        path = choice.path
        if path not in self.codings:
            by = self.importance().get(path)
            books = round_weight(self.weights[path], choice, importance=by)
            self.codings[path] = Coding(path, books)
        return self.codings[path]

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
            first = scaling.fit(weight, format, shared, c.batch)
            self.scales[part.path] = first
            self.done[part.path] = jnp.zeros(first.scale.shape, bool)
        at = place(part, weight.shape, shared, c.batch)
        known, done = at.inside((self.scales[part.path], self.done[part.path]))
        return Task(format, at, weight, known, done)

    def _put(self, part: Part, task: Task, found: Scales) -> None:
        path, at = part.path, task.place
        self.scales[path] = at.put(self.scales[path], found)
        done = self.done[path]
        ours = at.ours.reshape(done[at.index].shape)
        self.done[path] = done.at[at.index].set(done[at.index] | ours)


def _with(weight: Array, part: Part, w: Array) -> Array:
    """The weight with other numbers in a part."""
    flat = weight.reshape(-1).at[part.elements].set(w.astype(weight.dtype))
    return flat.reshape(weight.shape)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def why_unfitted(
    fn: Callable, params: PyTree, args: tuple, choices: list[Choice], *, codes: bool
) -> dict[str, str]:
    """For each weight that is rounded to the nearest, why.

    Args:
        fn, params, args: as for `quantize`.
        choices: what becomes of each array.
        codes: whether codebooks can be fitted.
    """
    plain_fn, weights, _ = opened(fn, params, is_quantized)
    return _unfitted(plain_fn, weights, args, choices, codes=codes)


def _unfitted(
    fn: Callable,
    weights: dict[str, Any],
    args: tuple,
    choices: list[Choice],
    *,
    codes: bool,
) -> dict[str, str]:
    candidates = find_uses(fn, weights, args).candidates
    found = {}
    for c in choices:
        if c.format is None:
            continue
        candidate = candidates[c.path]
        if not (codes or isinstance(c.format, Format)):
            found[c.path] = "its codebooks are learned by k-means"
        elif candidate.reason or candidate.looked_up:
            why = "rows of it are looked up too, of which no statistic tells"
            found[c.path] = candidate.reason or why
    return found
