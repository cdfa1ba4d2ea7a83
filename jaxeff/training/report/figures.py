"""The report's plots: which rows and layers are drawn, and under which name."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jaxeff.cost import quantity

from .bars import Bar, bars
from .scatter import HEIGHT, Point, Scatter, scatter
from .svg import svg, WIDTH
from .table import show
from .words import best_row, number, percent, Row, short_names

# Key of a row, title of the axis, unit.
PLOTS = (
    ("bytes", "size of the weights", "B"),
    ("flops", "FLOPs per prediction", "FLOP"),
    ("latency_s", "latency", "s"),
)
_LAYER_PLOTS = (
    ("parameters", "Parameters", ""),
    ("bytes", "Bytes", "B"),
    ("flops", "FLOPs per prediction", ""),
)
_MOST_LAYERS = 24


def row_scatter(rows: Sequence[Row], key: str, title: str, unit: str) -> Scatter | None:
    """Accuracy against `key`; `None` where no row has both."""
    best = best_row(rows)
    names = short_names([str(r["name"]) for r in rows])
    drawn = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        x, accuracy = number(row.get(key)), number(row.get("accuracy"))
        if x is None or x <= 0 or accuracy is None:
            continue
        std = number(row.get("accuracy_std"))
        low, high = (number(row.get(k)) for k in ("latency_low", "latency_high"))
        timed = key == "latency_s" and low is not None and high is not None and low > 0
        drawn.append(
            Point(
                name if len(name) <= 24 else f"{name[:23]}…",
                x,
                100 * accuracy,
                x_range=(low, high) if timed else None,
                y_range=(100 * (accuracy - std), 100 * (accuracy + std))
                if std
                else None,
                color=i,
                strong=row is best,
                detail=f"{row['name']}: {percent(accuracy)}, {show(row, key, unit)}",
            )
        )
    if not drawn:
        return None
    dense = number(rows[0].get("accuracy"))
    baseline = None if dense is None else 100 * dense
    return scatter(drawn, x_title=title, x_unit=unit, baseline=baseline)


def _describe(rows: Sequence[Row], key: str, unit: str) -> str:
    return "; ".join(
        f"{r['name']}: {percent(r.get('accuracy'))}, {show(r, key, unit)}" for r in rows
    )


def plots(rows: Sequence[Row]) -> str:
    """The section of accuracy against each cost."""
    figures = []
    for key, title, unit in PLOTS:
        plot = row_scatter(rows, key, title, unit)
        if plot is None:
            continue
        name = f"Accuracy against {title}"
        drawn = svg(
            plot.body,
            width=WIDTH,
            height=HEIGHT,
            title=name,
            desc=_describe(rows, key, unit),
        )
        figures.append(f'<figure class="card"><h3>{name}</h3>\n{drawn}</figure>\n')
    if not figures:
        return ""
    return (
        "<section>\n<h2>What accuracy costs</h2>\n"
        '<p class="hint">Up is more accurate, left is cheaper; shapes and colours are '
        "those of the table. The dotted line is the accuracy of the first row.</p>\n"
        f'<div class="plots">\n{"".join(figures)}</div>\n</section>'
    )


def layer_bars(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The section of bars per layer: the dense model and the one that leads."""
    layers = results.get("layers") or {}
    if len(layers) < 2:
        return ""
    first, *others = layers
    best = best_row(rows)
    chosen = best["name"] if best is not None and best["name"] in others else others[-1]
    figures = []
    for key, title, unit in _LAYER_PLOTS:
        paired = _pair(layers[first], layers[chosen], key)
        if not paired:
            continue
        body, height = bars(
            paired,
            unit=unit,
            before=short_names([first])[0],
            after=short_names([chosen])[0],
        )
        desc = "; ".join(
            f"{b.name}: {quantity(b.before, unit)}, then {quantity(b.after, unit)}"
            for b in paired
        )
        drawn = svg(
            body, width=WIDTH, height=height, title=f"{title} per layer", desc=desc
        )
        figures.append(f'<figure class="card"><h3>{title}</h3>\n{drawn}</figure>\n')
    if not figures:
        return ""
    return (
        "<section>\n<h2>Where it went, layer by layer</h2>\n"
        f'<p class="hint">{escape(str(first))} in grey, what is left in '
        f"{escape(str(chosen))} in blue.</p>\n"
        f'<div class="plots">\n{"".join(figures)}</div>\n</section>'
    )


def _pair(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], key: str
) -> list[Bar]:
    """The layers side by side by path; the smallest together as one bar."""
    values: dict[str, list[float]] = {}
    for i, layers in enumerate((before, after)):
        for layer in layers:
            pair = values.setdefault(str(layer["path"]), [0.0, 0.0])
            pair[i] += number(layer.get(key)) or 0.0
    values = {path: pair for path, pair in values.items() if max(pair) > 0}
    largest = sorted(values, key=lambda path: -max(values[path]))
    few = len(values) <= _MOST_LAYERS
    shown = set(largest if few else largest[: _MOST_LAYERS - 1])
    names = _trim(list(values))
    found = [
        Bar(name, *values[path])
        for path, name in zip(values, names, strict=True)
        if path in shown
    ]
    rest = [pair for path, pair in values.items() if path not in shown]
    if rest:
        sums = [sum(pair[i] for pair in rest) for i in (0, 1)]
        found.append(Bar(f"{len(rest)} smaller layers", *sums))
    return found


def _trim(paths: Sequence[str]) -> list[str]:
    """Paths without the components that all of them begin with."""
    split = [p.split("/") for p in paths]
    while (
        len(paths) > 1 and min(map(len, split)) > 1 and len({s[0] for s in split}) == 1
    ):
        split = [s[1:] for s in split]
    return ["/".join(s) for s in split]
