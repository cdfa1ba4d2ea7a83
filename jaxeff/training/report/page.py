"""One self-contained page of what each version of a model costs and saves.

`write_report` turns plain numbers (what `results.json` holds) into HTML with its
style and plots inside: no script, no network, readable on a phone, light and dark.
The parts are in `table.py` and `figures.py`, how numbers become words
in `words.py`.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .figures import layer_bars, PLOTS, plots, row_scatter
from .labels import text_width
from .scatter import HEIGHT
from .style import PAGE_CSS
from .svg import PLOT_CSS, svg, WIDTH
from .table import table, tiles
from .words import best_row, headline, number, Row, short_names

Results = Mapping[str, Any]

_UNITS = (
    "1 kB is 1000 bytes. A multiply-add counts as two FLOPs. Differences of accuracy "
    "are in percentage points. Ratios are to the first row. Small grey lines give the "
    "standard deviation of accuracy, the quartiles of latency, the bounds of energy."
)


def write_report(path: str | os.PathLike[str], results: Results) -> Path:
    """Writes the page to `path`, whole or not at all.

    Args:
        path: of the HTML file; its folder is made where it is missing.
        results: plain numbers and strings. `rows` (the first is the dense model)
            hold `name` and, where known, `accuracy` in [0, 1], `accuracy_std`,
            `parameters`, `bytes`, `flops` per example, `latency_s` per call with
            `latency_low`, `latency_high` and `latency_batch`, `peak_bytes` of memory
            in a call, `energy_j` per example with `energy_low`, `energy_high` and
            `energy_method`, `grams_co2` per example, `usd_per_million`,
            `train_seconds`. Besides
            them `title`, `date`, `device`, `versions`, `data` (`name`, `train`,
            `test`), `layers` (per model a list of `path`, `parameters`, `bytes`,
            `flops`), `methods` and `notes`. What is missing, `None` or NaN shows
            as a dash.

    Raises:
        ValueError: no rows, or a row without a name.
    """
    page = report_html(results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def report_html(results: Results) -> str:
    """The page as text; arguments as for `write_report`."""
    rows = _rows(results)
    title = escape(str(results.get("title") or "What compression costs and saves"))
    sections = [
        _header(results, rows, title),
        table(rows),
        plots(rows),
        layer_bars(results, rows),
        _methods(results, rows),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{PAGE_CSS}{PLOT_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main>\n</body>\n</html>\n"
    )


def _rows(results: Results) -> Sequence[Row]:
    rows = results.get("rows") or []
    if not rows:
        raise ValueError(
            "a report needs at least one row, got none: results['rows'] is a list of "
            "dicts with a name, accuracy, bytes, flops, latency_s ..."
        )
    for i, row in enumerate(rows):
        if not row.get("name"):
            raise ValueError(
                f"row {i} of {len(rows)} has no name: give it one, such as 'dense'."
            )
    return rows


def _header(results: Results, rows: Sequence[Row], title: str) -> str:
    data = results.get("data") or {}
    about = [str(data["name"])] if data.get("name") else []
    for key, word in (("train", "training"), ("test", "test")):
        count = number(data.get(key))
        if count is not None:
            about.append(f"{count:,.0f} {word} examples")
    about += [str(results[k]) for k in ("device", "date") if results.get(k)]
    # Each stays on one line where it fits, its dot at the end of the line.
    dots = [" ·"] * (len(about) - 1) + [""]
    spans = [f"<span>{escape(a)}{d}</span>" for a, d in zip(about, dots, strict=False)]
    best = best_row(rows)
    who = ""
    if best is not None:
        who = f"{best['name']}, compared with {rows[0]['name']}"
    return (
        f"<header>\n<h1>{title}</h1>\n"
        f'<p class="eyebrow">{" ".join(spans)}</p>\n'
        f'<p class="lead">{escape(headline(rows))}</p>\n'
        f'<p class="who">{escape(who)}</p>\n{tiles(rows)}</header>'
    )


def _methods(results: Results, rows: Sequence[Row]) -> str:
    methods = {str(k): str(v) for k, v in (results.get("methods") or {}).items() if v}
    if "energy" not in methods:
        found = dict.fromkeys(
            r["energy_method"] for r in rows if isinstance(r.get("energy_method"), str)
        )
        methods |= {"energy": "; ".join(found)} if found else {}
    items = [(k[:1].upper() + k[1:], v) for k, v in methods.items()]
    items.append(("Units", _UNITS))
    notes = [str(n) for n in results.get("notes") or []]
    items += [("Notes" if i == 0 else "", n) for i, n in enumerate(notes)]
    versions = results.get("versions") or {}
    if versions:
        items.append(("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    body = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in items
    )
    return (
        "<section>\n<h2>How it was measured</h2>\n"
        f'<dl class="methods">\n{body}</dl>\n</section>'
    )


def plot_svg(results: Results) -> str:
    """Accuracy against bytes and against FLOPs, as one picture on its own.

    Args:
        results: as for `write_report`.
    """
    rows = _rows(results)
    drawn = []
    for key, title, unit in PLOTS[:2]:
        plot = row_scatter(rows, key, title, unit)
        if plot is not None:
            shift = 14 + (WIDTH + 24) * len(drawn)
            drawn.append(f'<g transform="translate({shift} 52)">{plot.body}</g>')
    if not drawn:
        raise ValueError(
            "nothing to draw: no row has an accuracy and bytes or FLOPs above zero."
        )
    width = 14 + (WIDTH + 24) * len(drawn) - 10
    best, lead = best_row(rows), headline(rows)
    if best is not None:
        lead = f"{short_names([str(best['name'])])[0]}: {lead}"
    size = min(16.0, (width - 36) / text_width(lead, 1.1))
    back = f'<rect class="page" width="{width}" height="{HEIGHT + 64}" rx="8"/>'
    text = f'<text class="strong" x="18" y="32" font-size="{size:.1f}">'
    text += f"{escape(lead)}</text>"
    return svg(
        "\n".join([f"<style>{PLOT_CSS}</style>", back, text, *drawn]),
        width=width,
        height=HEIGHT + 64,
        title="Accuracy against size and FLOPs",
        desc=lead,
    )
