"""The report's figures as HTML: four tiles and the table of every model."""

from collections.abc import Sequence
from html import escape

from jaxeff.cost import quantity

from .svg import marker
from .words import (
    best_reason,
    best_row,
    comparison,
    DASH,
    dollars,
    factor,
    number,
    percent,
    points,
    Row,
)


def tiles(rows: Sequence[Row]) -> str:
    """What the report leads with, in four numbers."""
    best = best_row(rows)
    if best is None:
        return ""
    dense = rows[0]
    tiles = []
    for key, name, unit in (
        ("bytes", "Size", "B"),
        ("flops", "FLOPs", ""),
        ("latency_s", "Latency", "s"),
    ):
        change = comparison(best, dense, key) or DASH
        values = f"{show(dense, key, unit)} → {show(best, key, unit)}"
        tiles.append((name, change, values))
    both = f"{percent(dense.get('accuracy'))} → {percent(best.get('accuracy'))}"
    tiles.append(("Accuracy", points(best, dense) or DASH, both))
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f'<dd class="big">{escape(change)}</dd>'
        f'<dd class="small">{escape(values)}</dd></div>\n'
        for name, change, values in tiles
    )
    return f'<dl class="tiles">\n{items}</dl>\n'


def show(row: Row, key: str, unit: str, times: float = 1.0) -> str:
    """A figure of a row with its unit, or a dash."""
    value = number(row.get(key))
    return quantity(None if value is None else value * times, unit)


def _range(row: Row, low: str, high: str, unit: str) -> str:
    if number(row.get(low)) is None or number(row.get(high)) is None:
        return ""
    return f"{show(row, low, unit)} to {show(row, high, unit)}"


def table(rows: Sequence[Row]) -> str:
    """Every row; its first column stays in sight while the rest scrolls."""
    batches = {number(r.get("latency_batch")) for r in rows} - {None}
    batch = f"batch of {batches.pop():.0f}" if len(batches) == 1 else "per call"
    heads = [
        ("Accuracy", "test set"),
        ("Parameters", ""),
        ("Size", ""),
        ("FLOPs", "per prediction"),
        ("Latency", batch),
        ("Peak memory", batch),
        ("Energy", "per prediction"),
        ("CO₂e", "per million"),
        ("Price", "per million"),
        ("Training", ""),
    ]
    cells = [_cells(row, rows[0]) for row in rows]
    # A column that nobody measured says nothing.
    used = [i for i in range(len(heads)) if any(DASH != c[i][0] for c in cells)]
    head = "".join(
        f'<th scope="col">{name}<small>{note}</small></th>'
        if note
        else f'<th scope="col">{name}</th>'
        for name, note in (heads[i] for i in used)
    )
    body = []
    best = best_row(rows)
    why = f"{best_reason(rows)} " if best is not None else ""
    for i, (row, values) in enumerate(zip(rows, cells, strict=True)):
        tds = "".join(_cell(*values[j]) for j in used)
        mark = ' class="best"' if row is best else ""
        body.append(
            f'<tr{mark}><th scope="row">{_key(i)}{escape(str(row["name"]))}</th>'
            f"{tds}</tr>\n"
        )
    return (
        "<section>\n<h2>Every model</h2>\n"
        f'<p class="hint">Below each figure, how it compares with the first row. {why}'
        '<span class="narrow">The table scrolls sideways.</span></p>\n'
        '<div class="card table"><div class="scroll" tabindex="0" role="region" '
        'aria-label="Table of every model">\n<table>\n'
        f'<thead><tr><th scope="col">Model</th>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(body)}</tbody>\n</table>\n</div></div>\n</section>"
    )


def _cells(row: Row, first: Row) -> list[tuple[str, str, str, str]]:
    """Per column: the figure, its comparison, good or bad, its range."""

    def cell(key, unit, span="", times=1.0):
        shown = show(row, key, unit, times)
        if key == "usd_per_million":
            shown = dollars(row.get(key))
        if row is first:
            return shown, "", "", span
        ratio = factor(row, first, key) or 1.0
        # Within a few per cent a measured figure is neither better nor worse.
        same = 1.005 if key in ("parameters", "bytes", "flops") else 1.05
        kind = "good" if ratio > same else "bad" if ratio < 1 / same else ""
        return shown, comparison(row, first, key), kind, span

    std = number(row.get("accuracy_std"))
    span = "" if std is None else f"± {100 * std:.1f}"
    change = "" if row is first else points(row, first)
    kind = {"+": "good", "−": "bad"}.get(change[:1], "")
    return [
        (percent(row.get("accuracy")), change, kind, span),
        cell("parameters", ""),
        cell("bytes", "B"),
        cell("flops", ""),
        cell("latency_s", "s", _range(row, "latency_low", "latency_high", "s")),
        cell("peak_bytes", "B"),
        cell("energy_j", "J", _range(row, "energy_low", "energy_high", "J")),
        cell("grams_co2", "g", times=1e6),
        cell("usd_per_million", ""),
        cell("train_seconds", "s"),
    ]


def _cell(value: str, change: str, kind: str, span: str) -> str:
    mark = f' class="{kind}"' if kind else ""
    small = f"<small{mark}>{escape(change)}</small>" if change else ""
    small += f"<small>{escape(span)}</small>" if span and value != DASH else ""
    return f"<td>{escape(value)}{small}</td>"


def _key(color: int) -> str:
    drawn = marker(7, 7, color)
    return f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{drawn}</svg>'
