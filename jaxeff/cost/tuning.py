"""Runs each convolution with the number of channels that is fastest here.

A library of convolutions picks its kernel and its blocks by the number of channels,
and some numbers fall into a hole: XLA on a CPU convolves 3 -> 32 channels more slowly
than 3 -> 64, and 4 -> 32 several times as fast. Channels of zeros change nothing but
the time, so `tune_convolutions` measures every convolution of a function with more of
them, on the machine it runs on, and keeps what was clearly faster.

A shrunk model needs it most: its widths are whatever its scores left over.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from rich.console import Console
from rich.progress import Progress

from jaxeff.program import bind, Call, Interpreter, Rewritten, table, Where

from .timing import measure_latency

# What counts are padded to: a vector of a CPU, a tensor core's. 1 is as written.
MULTIPLES = (1, 4, 8)
# A form replaces the convolution as written if it takes less than this share of its
# time: below that the measurement may be mistaken, and padding takes memory.
CLEARLY = 0.9

Channels = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Timed:
    """One kind of convolution, and what was measured of it.

    Attributes:
        convolution: dtype, channels, shapes and window, without the size of the batch.
        count: how often it stands in the program.
        padded: (in, out) channels with which it runs; None is as written.
        seconds: as written, median.
        best: as it runs, median.
    """

    convolution: str
    count: int
    padded: Channels | None
    seconds: float
    best: float


@dataclasses.dataclass(frozen=True)
class Tuned(Rewritten):
    """A function with some channels of zeros; see `tune_convolutions`.

    Attributes:
        padded: the (in, out) channels to run with, of each convolution that gets more.
        measured: what was measured; empty for a model that was read from a file.
        aligned: kinds of convolutions whose channels are multiples of 8 as written.
    """

    padded: tuple[tuple[str, Channels], ...]
    measured: tuple[Timed, ...] = ()
    aligned: int = 0

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn`, to rounding."""
        if not self.padded:
            return self.fn(params, *args, **kwargs)
        # The leaves are opened: `fn` itself multiplies them in their own way.
        call = Call(self.fn, params, args, kwargs, open_leaves=True)
        return call.run(_Padding(dict(self.padded)))

    def __str__(self) -> str:
        """A line for each kind of convolution that was measured."""
        head = ["convolution", "runs as", "count", "ms as written", "ms tuned"]
        rows = [
            [
                m.convolution,
                "written" if m.padded is None else _arrow(m.padded),
                str(m.count),
                f"{1e3 * m.seconds:.2f}",
                f"{1e3 * m.best:.2f}",
            ]
            for m in self.measured
        ]
        return "\n".join(
            [
                table(head, rows),
                f"{self.aligned} more have channels in multiples of {MULTIPLES[-1]}.",
            ]
        )

    def settings(self) -> dict[str, Any]:
        """The channels of each padded convolution."""
        return {"padded": {k: list(v) for k, v in self.padded}}

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> "Tuned":
        """`fn` with these channels."""
        padded = settings["padded"].items()
        return cls(fn, tuple((k, (int(i), int(o))) for k, (i, o) in padded))


def tune_convolutions(
    fn: Callable,
    params: Any,
    *args: Any,
    repeats: int = 9,
    max_seconds: float | int = 2.0,
    progress: bool = True,
) -> Tuned:
    """Measures every convolution with channels of zeros, and keeps what is faster.

    The input and output channels of each are padded to the next multiples of 4 and 8
    and timed against the convolution as written, interleaved, on the default device.
    Print the result to see it. Grouped and depthwise convolutions stay as they are,
    and so do those in a function with a derivative rule of its own.

    Law: the result computes what `fn` computes, to rounding, for every batch size; so
    do its derivatives. A convolution on another image size runs as written.

    Apply it last: to what was shrunk, quantized or factorized.

    Args:
        fn: `fn(params, *args)`.
        params, args: or their shapes. The batch should be the one that will run.
        repeats: timed calls of each form.
        max_seconds: no more rounds for one convolution after this long, once each of
            its forms was timed three times.
        progress: whether to show a bar, if there is a terminal.

    Raises:
        ValueError: there is no convolution whose channels could be padded.
    """
    call = Call(fn, params, args, {}, open_leaves=True)
    found = _Finding()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.inputs]
    jax.eval_shape(lambda xs: call.run(found, xs), shapes)
    if not found.convolutions:
        raise ValueError(
            "tune_convolutions looks for convolutions whose channels are not in "
            "groups, and the function has none. Use it as it is."
        )
    alike = found.convolutions
    several = {k: e for k, e in alike.items() if len(_forms(_channels(e[0]))) > 1}
    measured = []
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("convolutions", total=len(several))
        for name, eqns in several.items():
            measured.append(_measure(name, eqns, repeats, max_seconds))
            bar.advance(task)
    padded = tuple((m.convolution, m.padded) for m in measured if m.padded)
    return Tuned(fn, padded, tuple(measured), len(alike) - len(several))


def _measure(
    name: str, eqns: Sequence[JaxprEqn], repeats: int, max_seconds: float
) -> Timed:
    """The fastest number of channels for equations that are alike."""
    eqn = eqns[0]
    channels = _channels(eqn)
    forms = _forms(channels)
    operands = [jnp.ones(v.aval.shape, v.aval.dtype) for v in eqn.invars]

    def thunk(form):
        run = jax.jit(lambda *xs: _convolve(eqn, xs, form))
        return functools.partial(run, *operands)

    times = measure_latency(
        {str(form): thunk(form) for form in forms},
        repeats=repeats,
        max_seconds=max_seconds,
    )
    seconds = {form: times[str(form)].median for form in forms}
    best = min(forms, key=seconds.__getitem__)
    if seconds[best] > CLEARLY * seconds[channels]:
        best = channels
    padded = None if best == channels else best
    return Timed(name, len(eqns), padded, seconds[channels], seconds[best])


def _forms(channels: Channels) -> list[Channels]:
    """What a convolution could run with; the first is as written."""
    up = lambda n: sorted({-(-n // m) * m for m in MULTIPLES})
    return list(itertools.product(*map(up, channels)))


class _Padding(Interpreter):
    """Gives convolutions the channels that were found to be fast."""

    def __init__(self, padded: dict[str, Channels]):
        super().__init__()
        self.padded = padded

    def equation(
        self, eqn: JaxprEqn, args: list[Any], where: Where
    ) -> Sequence[Any] | None:
        """A convolution that is known, with more channels."""
        if not _can_pad(eqn):
            return None
        form = self.padded.get(_name(eqn))
        return None if form is None else [_convolve(eqn, args, form)]


class _Finding(Interpreter):
    """Collects the convolutions that `_Padding` would meet, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: dict[str, list[JaxprEqn]] = {}

    def equation(
        self, eqn: JaxprEqn, args: list[Any], where: Where
    ) -> Sequence[Any] | None:
        """Runs nothing of its own."""
        if _can_pad(eqn):
            self.convolutions.setdefault(_name(eqn), []).append(eqn)
        return None


def _can_pad(eqn: JaxprEqn) -> bool:
    groups = ("feature_group_count", "batch_group_count")
    return eqn.primitive.name == "conv_general_dilated" and all(
        eqn.params[g] == 1 for g in groups
    )


def _channels(eqn: JaxprEqn) -> Channels:
    """(in, out) as written."""
    dims = eqn.params["dimension_numbers"].rhs_spec
    shape = eqn.invars[1].aval.shape
    return shape[dims[1]], shape[dims[0]]


def _convolve(eqn: JaxprEqn, args: Sequence[Any], form: Channels) -> jax.Array:
    """The convolution with `form` channels, and of its outputs those as written."""
    spec = eqn.params["dimension_numbers"]
    (has_in, has_out), (x, w) = _channels(eqn), args
    more_in, more_out = form[0] - has_in, form[1] - has_out
    x = _pad(x, spec.lhs_spec[1], more_in)
    w = _pad(_pad(w, spec.rhs_spec[1], more_in), spec.rhs_spec[0], more_out)
    y = bind(eqn, [x, w])[0]
    return jax.lax.slice_in_dim(y, 0, has_out, axis=spec.out_spec[1])


def _pad(x: jax.Array, dim: int, more: int) -> jax.Array:
    return jnp.pad(x, [(0, more if d == dim else 0) for d in range(x.ndim)])


def _name(eqn: JaxprEqn) -> str:
    """What tells kinds of convolutions apart, without the size of the batch."""
    p, spec = eqn.params, eqn.params["dimension_numbers"]
    x, w = (v.aval for v in eqn.invars)
    by = lambda sizes: "x".join(map(str, sizes))
    image = by(x.shape[d] for d in spec.lhs_spec[2:])
    kernel = by(w.shape[d] for d in spec.rhs_spec[2:])
    layout = f"{_letters('NC', spec.lhs_spec)},{_letters('OI', spec.rhs_spec)}"
    said = [f"{x.dtype} {_arrow(_channels(eqn))}, {image} by {kernel}, {layout}"]
    said.append(f"padding {by(f'{low}+{high}' for low, high in p['padding'])}")
    for what in ("window_strides", "lhs_dilation", "rhs_dilation"):
        if any(n != 1 for n in p[what]):
            said.append(f"{what} {by(p[what])}")
    return ", ".join(said)


def _letters(first: str, spec: Sequence[int]) -> str:
    """The order of the dims, such as N01C."""
    names = first + "".join(map(str, range(len(spec) - 2)))
    return "".join(names[list(spec).index(d)] for d in range(len(spec)))


def _arrow(channels: Channels) -> str:
    return f"{channels[0]} -> {channels[1]}"
