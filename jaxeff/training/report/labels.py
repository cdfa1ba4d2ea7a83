"""Text in a plot: how wide it is, and where it overlaps nothing."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from .svg import Real

FONT = 12  # px, as in PLOT_CSS


def text_width(text: str, size: Real = FONT) -> float:
    """Pixels a text takes at most, in the widest of the usual system fonts."""
    narrow, wide = "il.,:;|'!()[]tfjrI -/", "mwMW@%"
    em = lambda c: (
        0.42 if c in narrow else 1.0 if c in wide else 0.7 if c.isupper() else 0.645
    )
    return size * sum(em(c) for c in text)


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle, in pixels, y downwards."""

    x0: Real
    y0: Real
    x1: Real
    y1: Real

    def overlaps(self, other: "Box", gap: Real = 0.0) -> bool:
        """Whether the two come nearer than `gap` in both directions."""
        return (
            self.x0 < other.x1 + gap
            and other.x0 < self.x1 + gap
            and self.y0 < other.y1 + gap
            and other.y0 < self.y1 + gap
        )

    def inside(self, other: "Box") -> bool:
        """Whether `other` holds all of it."""
        return (
            self.x0 >= other.x0
            and self.y0 >= other.y0
            and self.x1 <= other.x1
            and self.y1 <= other.y1
        )


@dataclasses.dataclass(frozen=True)
class Label:
    """Where a name is written, and the point it belongs to (pixels)."""

    name: str
    box: Box
    point: tuple[Real, Real]
    lead: bool  # far enough from its point to need a line to it


def place_labels(
    names: Sequence[str],
    points: Sequence[tuple[Real, Real]],
    area: Box,
    avoid: Sequence[Box] = (),
) -> list[Label]:
    """Writes each name near its point, over no other name and over no point.

    Greedy, the most crowded point first; for each the nearest place that is free,
    tied to the point by a line where it is not right beside it. Lines run under
    names where they must. A name for which no place is left is not written.

    Args:
        names: one per point.
        points: pixels.
        area: where names may stand.
        avoid: what a name should rather not cover, such as error bars.
    """
    markers = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    crowd = [sum(math.dist(p, q) < 60 for q in points) for p in points]
    placed: list[Label] = []
    for i in sorted(range(len(names)), key=lambda i: (-crowd[i], points[i][0])):
        others = [m for j, m in enumerate(markers) if j != i]
        best, least = None, math.inf
        for distance, box in _places(points[i], text_width(names[i]), area):
            if distance >= least:
                break  # they come nearest first
            label = Label(names[i], box, points[i], lead=distance > 14)
            if box.overlaps(markers[i]) or not box.inside(area):
                continue
            if any(box.overlaps(b, 1.0) for b in others + [p.box for p in placed]):
                continue
            covers = sum(box.overlaps(a) for a in avoid)
            cost = distance + 25 * covers + _tangle(label, others, placed)
            if cost < least:
                best, least = label, cost
        if best is not None:
            placed.append(best)
    return placed


def _places(
    point: tuple[Real, Real], width: Real, area: Box
) -> Iterator[tuple[Real, Box]]:
    """Boxes around a point: the eight neighbours, then everywhere, nearest first."""
    x, y, h = *point, FONT + 2
    near = [
        Box(x + 9, y - h / 2, x + 9 + width, y + h / 2),
        Box(x - 9 - width, y - h / 2, x - 9, y + h / 2),
        Box(x - width / 2, y - 9 - h, x + width / 2, y - 9),
        Box(x - width / 2, y + 9, x + width / 2, y + 9 + h),
        Box(x + 5, y - 7 - h, x + 5 + width, y - 7),
        Box(x - 5 - width, y - 7 - h, x - 5, y - 7),
        Box(x + 5, y + 7, x + 5 + width, y + 7 + h),
        Box(x - 5 - width, y + 7, x - 5, y + 7 + h),
    ]
    yield from ((0.1 * i, box) for i, box in enumerate(near))
    far = []
    for row in range(int((area.y1 - area.y0 - h) / 6) + 1):
        for column in range(int(max(area.x1 - area.x0 - width, 0) / 8) + 1):
            x0, y0 = area.x0 + 8 * column, area.y0 + 6 * row
            box = Box(x0, y0, x0 + width, y0 + h)
            far.append((math.dist(point, nearest(box, point)), box))
    yield from sorted(far, key=lambda pair: pair[0])


def nearest(box: Box, point: tuple[Real, Real]) -> tuple[Real, Real]:
    """The point of a box that lies nearest to another point."""
    x, y = point
    return min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)


def _tangle(label: Label, markers: Sequence[Box], placed: Sequence[Label]) -> int:
    """How bad the lines are: as many pixels more of distance would be as bad."""
    line = _line(label) if label.lead else []
    own = Box(*label.point, *label.point)
    over_points = sum(_crosses(line, m) for m in markers if not own.inside(m))
    under_names = sum(_crosses(line, p.box) for p in placed)
    under_names += sum(p.lead and _crosses(_line(p), label.box) for p in placed)
    return 25 * over_points + 60 * under_names


def _line(label: Label) -> list[tuple[Real, Real]]:
    (x0, y0), (x1, y1) = label.point, nearest(label.box, label.point)
    return [(x0 + (x1 - x0) * t / 16, y0 + (y1 - y0) * t / 16) for t in range(17)]


def _crosses(line: Sequence[tuple[Real, Real]], box: Box) -> bool:
    return any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for x, y in line)


def shorten(text: str, room: Real) -> str:
    """The text with its middle left out, where it is wider than `room` pixels."""
    if text_width(text) <= room:
        return text
    keep = len(text)
    while keep > 2 and text_width(_middle_out(text, keep)) > room:
        keep -= 1
    return _middle_out(text, keep)


def _middle_out(text: str, keep: int) -> str:
    # More of the end than of the beginning: layers differ at the end of their path.
    head = keep // 3
    return f"{text[:head]}…{text[len(text) - (keep - head) :]}"
