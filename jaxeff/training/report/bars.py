"""Paired bars as SVG text: what each layer had, and what is left of it."""

import dataclasses
from collections.abc import Sequence
from html import escape

from jaxeff.cost import quantity

from .labels import shorten, text_width
from .svg import Real, WIDTH


@dataclasses.dataclass(frozen=True)
class Bar:
    """One layer before and after."""

    name: str
    before: Real
    after: Real


def bars(rows: Sequence[Bar], *, unit: str, before: str, after: str) -> tuple[str, int]:
    """Pairs of bars, one above the other by layer: what was there, what is left.

    Args:
        rows: in the order of the network.
        unit: of the values.
        before, after: names of the two models.

    Returns:
        SVG elements, and the height they take at `WIDTH`.
    """
    longest = max(max(r.before, r.after) for r in rows) or 1.0
    full = WIDTH - 2
    # What is there at all shows, be it ever so small.
    length = lambda v: max(full * v / longest, 1.5) if v > 0 else 0.0
    parts = [
        '<rect class="track" x="0" y="4" width="10" height="10" rx="2"/>'
        f'<text x="15" y="13">{escape(before)}</text>'
        f'<rect class="left" x="{24 + text_width(before):.0f}" y="4" width="10" '
        'height="10" rx="2"/>'
        f'<text x="{39 + text_width(before):.0f}" y="13">{escape(after)}</text>'
    ]
    for i, row in enumerate(rows):
        y = 28 + 33 * i
        value = f"{quantity(row.before, unit)} → {quantity(row.after, unit)}"
        room = full - text_width(value) - 10
        parts.append(
            f"<g><title>{escape(row.name)}: {escape(value)}</title>"
            f'<text class="name" x="0" y="{y + 10}">'
            f"{escape(shorten(row.name, room))}</text>"
            f'<text x="{WIDTH - 2}" y="{y + 10}" text-anchor="end">{value}</text>'
            f'<rect class="track" x="0" y="{y + 15}" height="9" rx="2" '
            f'width="{length(row.before):.1f}"/>'
            f'<rect class="left" x="0" y="{y + 15}" height="9" rx="2" '
            f'width="{length(row.after):.1f}"/></g>'
        )
    return "\n".join(parts), 28 + 33 * len(rows)
