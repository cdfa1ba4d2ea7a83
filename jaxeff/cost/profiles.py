"""One table of what each version of a model costs, measured together.

FLOPs and bytes moved are counted on the traced program, memory is the compiler's
plan, time and energy are measured, all versions interleaved. Money and carbon are
those figures at stated prices (`Profile.row`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree
from rich import box
from rich.table import Table

from jaxeff import program
from jaxeff.tree import split_static, tree_bytes

from .carbon import grams_co2, Intensity
from .counters import Energy
from .energy import measure_energies
from .memory import count_parameters, Memory, peak_memory
from .money import usd_per_million
from .timing import Latency, measure_latency, Thunk

Model = tuple[Callable[..., Any], PyTree]


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one call of one model costs. `examples` of them share the call."""

    name: str
    parameters: int
    bytes: int  # the parameters, as they are stored
    flops: int  # of one call, counted on the program; a multiply-add is 2
    bytes_moved: int  # of one call, if nothing were fused: an upper bound
    memory: Memory  # peak of one call
    latency: Latency  # seconds of one call
    energy: Energy | None  # of one call
    examples: int

    def row(
        self,
        *,
        usd_per_hour: float | int | None = None,
        place: Intensity | str | float | int | None = None,
        pue: float | int = 1.0,
    ) -> dict[str, Any]:
        """The figures as plain numbers, those of the call shared by its examples.

        Args:
            usd_per_hour: price of the machine, for the price of predictions.
            place: carbon intensity, as for `grams_co2`.
            pue: power usage effectiveness of the building.

        Returns:
            Per example: `flops`, `energy_j` with its bounds, `grams_co2`. Per
            call: `latency_s` with its quartiles, `peak_bytes`. The rest says its
            unit; a figure without its price or method is `None`.
        """
        energy = None if self.energy is None else self.energy / self.examples
        grams = None
        if energy is not None and place is not None:
            grams = grams_co2(energy.joules, place, pue=pue)
        usd = None
        if usd_per_hour is not None:
            usd = usd_per_million(
                self.latency.median, self.examples, usd_per_hour=usd_per_hour
            )
        return {
            "name": self.name,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "flops": round(self.flops / self.examples),
            "bytes_moved": round(self.bytes_moved / self.examples),
            "peak_bytes": self.memory.bytes,
            "memory_method": self.memory.method,
            "latency_s": self.latency.median,
            "latency_low": self.latency.low,
            "latency_high": self.latency.high,
            "latency_batch": self.examples,
            "latency_method": self.latency.method,
            "energy_j": None if energy is None else energy.joules,
            "energy_low": None if energy is None else energy.low,
            "energy_high": None if energy is None else energy.high,
            "energy_method": None if energy is None else energy.method,
            "grams_co2": grams,
            "usd_per_million": usd,
        }


def compare(
    models: Mapping[str, Model],
    args: Sequence[Any],
    *,
    examples: int = 1,
    repeats: int = 30,
    warmup: int = 3,
    max_seconds: float | int | None = None,
    energy_seconds: float | int | None = 0.5,
    progress: bool = False,
    **meter: Any,
) -> list[Profile]:
    """Profiles several versions of a model on the same arguments.

    Args:
        models: `(fn, params)` by name; the call is `fn(params, *args)`.
        args: arrays.
        examples: how many predictions one call makes (its batch size).
        repeats, warmup, max_seconds: of `measure_latency`.
        energy_seconds: how long to repeat each for its energy; `None` for none.
        progress: draw bars while measuring.
        **meter: options of `EnergyMeter`.
    """
    if not models:
        raise ValueError("compare needs at least one model: {'dense': (fn, params)}.")
    if examples < 1:
        raise ValueError(f"examples must be >= 1 prediction per call, got {examples}.")
    thunks: dict[str, Thunk] = {}
    memory: dict[str, Memory] = {}
    for name, (fn, params) in models.items():
        thunks[name], memory[name] = _compile(fn, params, args)
    times = measure_latency(
        thunks,
        repeats=repeats,
        warmup=warmup,
        max_seconds=max_seconds,
        progress=progress,
    )
    energies: dict[str, Energy] = {}
    if energy_seconds is not None:
        energies = measure_energies(
            thunks, seconds=energy_seconds, progress=progress, **meter
        )
    profiles = []
    for name, (fn, params) in models.items():
        costs = program.trace(fn, params, *args).costs
        profiles.append(
            Profile(
                name=name,
                parameters=count_parameters(params),
                bytes=tree_bytes(params),
                flops=costs.flops,
                bytes_moved=costs.bytes,
                memory=memory[name],
                latency=times[name],
                energy=energies.get(name),
                examples=examples,
            )
        )
    return profiles


def profile(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    name: str = "model",
    **options: Any,
) -> Profile:
    """What one call `fn(params, *args)` costs; options as for `compare`."""
    return compare({name: (fn, params)}, args, **options)[0]


def _compile(
    fn: Callable[..., Any], params: PyTree, args: Sequence[Any]
) -> tuple[Thunk, Memory]:
    arrays, fill = split_static((params, tuple(args)))
    if any(isinstance(a, jax.ShapeDtypeStruct) for a in arrays):
        raise ValueError(
            "time and energy need arrays, got only their shapes. For FLOPs and bytes "
            "of shapes use jaxeff.program.trace(fn, params, *args).costs."
        )

    def call(arrays):
        params, args = fill(arrays)
        return fn(params, *args)

    arrays = jax.device_put(arrays)  # once, not at every call
    compiled = jax.jit(call).lower(arrays).compile()
    return lambda: compiled(arrays), peak_memory(compiled)


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL = ((1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def quantity(value: float | int | None, unit: str = "") -> str:
    """`1.23 MB` for 1,230,000 B: three digits, an SI prefix; `–` where unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, prefix in _PREFIXES + _SMALL:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def comparison_table(
    profiles: Sequence[Profile],
    *,
    title: str = "Cost",
    first: Mapping[str, Sequence[str]] | None = None,
    last: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """A table with units, for `rich`; below each figure, its share of the first row's.

    Args:
        profiles: a row each.
        title: above the table.
        first, last: further columns before and after those of the costs, such as
            the accuracy: a cell for each row, by heading.
    """
    rows, examples = [p.row() for p in profiles], profiles[0].examples
    energy = profiles[0].energy
    method = "" if energy is None else f"Energy: {energy.method}. "
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # so that it fits into 80 columns
        pad_edge=False,
        caption=f"FLOPs, energy per example; latency, memory per call of {examples}. "
        f"{method}Latency: {profiles[0].latency.method}. "
        f"Memory: {profiles[0].memory.method}.",
    )
    words = [word for row in rows for word in row["name"].split()]
    table.add_column("", min_width=max(map(len, words)))
    columns = {
        "parameters": ("params", ""),
        "bytes": ("size", "B"),
        "flops": ("FLOPs", ""),
        "latency_s": ("latency", "s"),
        "energy_j": ("energy", "J"),
        "peak_bytes": ("memory", "B"),
    }
    costs = {
        heading: [
            f"{quantity(row[key], unit)}\n[dim]{_ratio(row[key], rows[0][key])}[/dim]"
            for row in rows
        ]
        for key, (heading, unit) in columns.items()
    }
    every = {**(first or {}), **costs, **(last or {})}
    for heading in every:
        table.add_column(heading, justify="right")
    for row, *cells in zip(rows, *every.values(), strict=True):
        table.add_row(row["name"], *cells)
    return table


def _ratio(value: float | int | None, first: float | int | None) -> str:
    return f"×{value / first:.2g}" if value is not None and first else ""
