"""A scatter plot as SVG text: accuracy against a cost, names beside the points.

Drawn by hand, so that a report needs no plotting library, no script and no network.
"""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from .labels import Box, Label, nearest, place_labels
from .svg import color_of, marker, Real, segment, WIDTH

HEIGHT = 280
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 26, 46


@dataclasses.dataclass(frozen=True)
class Point:
    """One labelled point. `x` and `y` are data, not pixels."""

    name: str
    x: Real
    y: Real
    x_range: tuple[Real, Real] | None = None
    y_range: tuple[Real, Real] | None = None
    color: int = 0  # which of the palette, and which shape
    strong: bool = False
    detail: str = ""  # what a pointer that rests on it shows


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale from data to pixels, and its ticks."""

    low: Real
    high: Real
    start: Real  # pixel of `low`
    end: Real  # pixel of `high`
    log: bool
    ticks: tuple[Real, ...]

    def __call__(self, value: Real) -> float:
        """The pixel of a value."""
        f = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.end - self.start)


def nice_ticks(low: Real, high: Real, most: int = 6) -> tuple[Real, ...]:
    """At most `most` round numbers, evenly spaced, within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for multiple in (1, 2, 2.5, 5, 10, 20):
        first = math.ceil(low / (step * multiple) - 1e-9)
        last = math.floor(high / (step * multiple) + 1e-9)
        if last - first < most:
            break
    return tuple(float(f"{i * step * multiple:.12g}") for i in range(first, last + 1))


def log_ticks(low: Real, high: Real, most: int = 6) -> tuple[Real, ...]:
    """Round numbers within [low, high], roughly evenly spaced in the logarithm."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 3), (1,)):
        ticks = [float(f"{s}e{d}") for d in decades for s in steps]
        inside = tuple(t for t in ticks if low <= t <= high)
        if 3 <= len(inside) <= most:
            return inside
    if len(inside) > most:
        return inside[:: math.ceil(len(inside) / most)]
    return nice_ticks(low, high, most)


def axis(values: Sequence[Real], start: Real, end: Real, *, log: bool) -> Axis:
    """An axis that holds all values, with some air at its ends."""
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** 0.14, 1.1)
        low, high = low / air, high * air
        return Axis(low, high, start, end, True, log_ticks(low, high))
    air = 0.14 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - air, high + air
    return Axis(low, high, start, end, False, nice_ticks(low, high))


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A plot as SVG elements (no `<svg>` around them), and its labels' boxes."""

    body: str
    labels: tuple[Label, ...]
    area: Box


def scatter(
    points: Sequence[Point], *, x_title: str, x_unit: str, baseline: Real | None = None
) -> Scatter:
    """Accuracy against something that should be small.

    Args:
        points: at least one; `y` in per cent, x > 0.
        baseline: accuracy to draw as a dotted line, in per cent.
        x_title: what x is.
        x_unit: its unit, without prefix.
    """
    area = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    xs = [v for p in points for v in (p.x, *(p.x_range or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_range or ()))]
    ys += [] if baseline is None else [baseline]
    log = max(xs) > 3 * min(xs)
    x = axis(xs, area.x0 + 6, area.x1 - 6, log=log)
    y = axis(ys, area.y1, area.y0, log=False)
    scale, unit = _prefix(x.ticks, x_unit)
    parts = [_grid(x, y, area, scale)]
    notes = ", ".join([unit] * bool(unit) + ["log scale"] * log)
    title = f"{x_title} ({notes})" if notes else x_title
    parts.append(
        f'<text x="{(area.x0 + area.x1) / 2:.1f}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(title)}</text>'
        f'<text x="4" y="14">accuracy (%)</text>'
    )
    avoid = _error_bars(points, x, y)
    if baseline is not None:
        level = y(baseline)
        parts.append(segment(area.x0, level, area.x1, level, "base"))
        avoid.append(Box(area.x0, level - 1, area.x1, level + 1))
    at = [(x(p.x), y(p.y)) for p in points]
    names = [p.name for p in points]
    # Away from the axes, or a name would read as one word with the tick beside it.
    free = Box(area.x0 + 12, area.y0, area.x1, area.y1 - 4)
    labels = place_labels(names, at, free, avoid)
    for label in labels:
        if label.lead:
            near = nearest(label.box, label.point)
            parts.append(segment(*label.point, *near, "lead"))
    # What leads the report is drawn last, over all others.
    for p, (px, py) in sorted(zip(points, at, strict=True), key=lambda z: z[0].strong):
        color = f'style="stroke:{color_of(p.color)}"'
        if p.x_range:
            a, b = (x(v) for v in p.x_range)
            parts.append(f'<path d="M{a:.1f} {py:.1f}H{b:.1f}" {color}/>')
        if p.y_range:
            a, b = (y(v) for v in p.y_range)
            parts.append(f'<path d="M{px:.1f} {a:.1f}V{b:.1f}" {color}/>')
        drawn = marker(px, py, p.color, size=6.5 if p.strong else 5)
        parts.append(f"<g><title>{escape(p.detail or p.name)}</title>{drawn}</g>")
    strong = {p.name for p in points if p.strong}
    for label in labels:
        kind = "name strong" if label.name in strong else "name"
        parts.append(
            f'<text class="{kind}" x="{label.box.x0:.1f}" y="{label.box.y1 - 3:.1f}">'
            f"{escape(label.name)}</text>"
        )
    return Scatter("\n".join(parts), tuple(labels), area)


def _error_bars(points: Sequence[Point], x: Axis, y: Axis) -> list[Box]:
    found = []
    for p in points:
        px, py = x(p.x), y(p.y)
        if p.y_range:
            low, high = (y(v) for v in p.y_range)
            found.append(Box(px - 1, min(low, high), px + 1, max(low, high)))
        if p.x_range:
            low, high = (x(v) for v in p.x_range)
            found.append(Box(low, py - 1, high, py + 1))
    return found


def _prefix(ticks: Sequence[Real], unit: str) -> tuple[Real, str]:
    """One SI prefix for all ticks: the one that suits the middle of them."""
    middle = abs(ticks[len(ticks) // 2]) or 1.0
    power = 3 * math.floor(math.log10(middle) / 3 + 1e-9)
    power = max(min(power, 12), -9)
    prefix = {12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}[power]
    return 10.0**power, f"{prefix}{unit}"


def _grid(x: Axis, y: Axis, area: Box, scale: Real) -> str:
    parts = []
    for tick in y.ticks:
        if tick <= 100:  # no accuracy is above 100 %
            parts.append(segment(area.x0, y(tick), area.x1, y(tick), "grid"))
            parts.append(
                f'<text x="{area.x0 - 6}" y="{y(tick) + 4:.1f}" '
                f'text-anchor="end">{tick:g}</text>'
            )
    for tick in x.ticks:
        parts.append(segment(x(tick), area.y1, x(tick), area.y1 + 4, "axis"))
        parts.append(
            f'<text x="{x(tick):.1f}" y="{area.y1 + 18:.1f}" '
            f'text-anchor="middle">{tick / scale:.4g}</text>'
        )
    parts.append(segment(area.x0, area.y1, area.x1, area.y1, "axis"))
    return "".join(parts)
