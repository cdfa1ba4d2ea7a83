"""What the report's drawings share: colours, markers, lines, the `<svg>` itself.

Colours are CSS variables (`PLOT_CSS`), so one drawing serves light and dark; every
row also has a shape of its own, so colour is never the only difference.
"""

from html import escape

Real = float | int

WIDTH = 360  # of one plot, pixels; it then scales to its container

# Blue, vermilion, green, purple, ochre, sky, brown after Okabe and Ito, each
# darkened (light theme) or lightened (dark) to stand out from the page by 3:1.
PLOT_CSS = """
.plot, .key { --ink: #1d2430; --soft: #5a6472; --rule: #dfe3e8; --track: #c9d0d9;
  --page: #fff; --c0: #1d2430; --c1: #0069b4; --c2: #c14a00; --c3: #007a58;
  --c4: #9c3f80; --c5: #8a6400; --c6: #2583b5; --c7: #7a4b2a; }
@media (prefers-color-scheme: dark) {
.plot, .key { --ink: #e8ebef; --soft: #a3adba; --rule: #313a46; --track: #4b5665;
  --page: #161b22; --c0: #e8ebef; --c1: #5fb3f5; --c2: #ff8c4b; --c3: #35c69a;
  --c4: #e08cc5; --c5: #e2b13c; --c6: #86cdf2; --c7: #c99a76; } }
.plot { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; font-size: 12px; }
.plot text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot text.name { fill: var(--ink); paint-order: stroke; stroke: var(--page);
  stroke-width: 3px; stroke-linejoin: round; }
.plot text.strong { fill: var(--ink); font-weight: 650; }
.plot .grid { stroke: var(--rule); }
.plot .axis { stroke: var(--soft); }
.plot .lead { stroke: var(--soft); stroke-width: .75; }
.plot .base { stroke: var(--soft); stroke-dasharray: 2 4; }
.plot .page { fill: var(--page); }
.plot .track { fill: var(--track); }
.plot .left { fill: var(--c1); }
.plot .point { stroke: var(--page); vector-effect: non-scaling-stroke; }
"""


# Unit shapes; a marker is one of them, scaled.
_SHAPES = (
    "",  # a circle
    "M-.9-.9H.9V.9H-.9Z",
    "M0-1.2 1.2 0 0 1.2-1.2 0Z",
    "M0-1.15 1.1.8H-1.1Z",
    "M0 1.15 1.1-.8H-1.1Z",
    "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "M-.55-1H.55L1.1 0 .55 1H-.55L-1.1 0Z",
    "M0-1.15 1.1-.35.7 1H-.7L-1.1-.35Z",
)


def color_of(index: int) -> str:
    """The CSS colour of a row."""
    return f"var(--c{index % len(_SHAPES)})"


def marker(x: Real, y: Real, color: int, *, size: Real = 5.0) -> str:
    """The shape and colour of one row, at a place."""
    fill = f'class="point" style="fill:{color_of(color)}"'
    shape = _SHAPES[color % len(_SHAPES)]
    if not shape:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {fill}/>'
    place = f"translate({x:.1f} {y:.1f}) scale({size:g})"
    return f'<path d="{shape}" transform="{place}" {fill}/>'


def segment(x0: Real, y0: Real, x1: Real, y1: Real, kind: str) -> str:
    """A straight line of a CSS class."""
    return f'<path class="{kind}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def svg(body: str, *, width: Real, height: Real, title: str, desc: str) -> str:
    """An `<svg>` that scales to its container and reads itself out."""
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{escape(title)}" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>\n{body}\n</svg>"
    )
