"""Numbers as words: ratios, differences, and the sentence that a report leads with.

Whatever was not measured, or came out as NaN, reads as a dash.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"
# What is less in the first word's sense costs less.
COMPARISON = {
    "parameters": ("fewer", "more"),
    "bytes": ("smaller", "larger"),
    "flops": ("fewer", "more"),
    "latency_s": ("faster", "slower"),
    "peak_bytes": ("less", "more"),
    "energy_j": ("less", "more"),
    "grams_co2": ("less", "more"),
    "usd_per_million": ("cheaper", "dearer"),
    "train_seconds": ("shorter", "longer"),
}
# Points of accuracy that a saving may cost and still lead the report.
TOLERANCE = 0.01

Row = Mapping[str, Any]


def number(value: Any) -> float | None:
    """The value as a finite float, `None` where there is none."""
    if value is None or isinstance(value, str):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def factor(row: Row, first: Row, key: str) -> float | None:
    """How many times less of `key` the row needs than the first; < 1 for more."""
    a, b = number(first.get(key)), number(row.get(key))
    return a / b if a is not None and b is not None and a > 0 and b > 0 else None


def comparison(row: Row, first: Row, key: str) -> str:
    """`2.6× fewer`, `1.2× slower`, `same`, or nothing where one is unknown."""
    ratio = factor(row, first, key)
    if ratio is None:
        return ""
    less, more = COMPARISON[key]
    size = max(ratio, 1 / ratio)
    if size < 1.005:
        return "same"
    digits = 2 if size < 1.95 else 1 if size < 99.95 else 0
    return f"{size:.{digits}f}× {less if ratio > 1 else more}"


def percent(value: Any, digits: int = 1) -> str:
    """`97.4 %` for 0.974."""
    value = number(value)
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def points(row: Row, first: Row) -> str:
    """`−0.4 points`: the difference of two accuracies, in percentage points."""
    a, b = number(row.get("accuracy")), number(first.get("accuracy"))
    if a is None or b is None:
        return ""
    difference = 100 * (a - b)
    if abs(difference) < 0.005:
        return "same"
    sign = "+" if difference > 0 else "−"
    size = abs(difference)
    return f"{sign}{size:.1f} points" if size >= 0.095 else f"{sign}{size:.2f} points"


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row a report leads with: the smallest that stays within a point of dense.

    Where none does, the most accurate of the others; `None` without a second row.
    """
    others = [r for r in rows[1:] if number(r.get("bytes")) is not None]
    if not others:
        return None
    accuracy = lambda r: number(r.get("accuracy"))
    dense = accuracy(rows[0])
    known = [r for r in others if accuracy(r) is not None]
    if dense is None or not known:
        return min(others, key=lambda r: float(r["bytes"]))
    close = [r for r in known if float(r["accuracy"]) >= dense - TOLERANCE - 1e-9]
    if close:
        return min(close, key=lambda r: float(r["bytes"]))
    return max(known, key=lambda r: float(r["accuracy"]))


def best_reason(rows: Sequence[Row]) -> str:
    """Why `best_row` chose as it did."""
    best, dense = best_row(rows), number(rows[0].get("accuracy"))
    accuracy = None if best is None else number(best.get("accuracy"))
    if accuracy is None or dense is None:
        return "Highlighted: the smallest."
    if accuracy >= dense - TOLERANCE - 1e-9:
        return "Highlighted: the smallest that loses at most one point of accuracy."
    return "Highlighted: the most accurate; none stays within one point."


def headline(rows: Sequence[Row]) -> str:
    """The main saving in words: `3× smaller and 2× fewer FLOPs, for 0.4 points of ...`.

    They speak of `best_row(rows)`, compared with the first row.
    """
    best = best_row(rows)
    if best is None:
        return "One model, nothing to compare it with"
    size, flops = (comparison(best, rows[0], key) for key in ("bytes", "flops"))
    size = "as large as before" if size == "same" else size
    flops = "" if flops == "same" else flops and f"{flops} FLOPs"
    saving = " and ".join(part for part in (size, flops) if part)
    return f"{saving or 'Size unknown'}, {_accuracy_words(best, rows[0])}"


def _accuracy_words(row: Row, first: Row) -> str:
    difference = points(row, first)
    if not difference:
        return "accuracy not measured"
    if difference == "same":
        return "at the same accuracy"
    size = difference[1:].replace("1.0 points", "1 point")
    if difference[0] == "+":
        return f"and {size} more accurate"
    return f"for {size} of accuracy"


def dollars(value: Any) -> str:
    """`$12.34`, and three digits that count below one dollar: `$0.000445`."""
    value = number(value)
    if value is None:
        return DASH
    if value >= 1 or value <= 0:
        return f"${value:,.2f}"
    return f"${value:.{2 - math.floor(math.log10(value))}f}"


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what stands in brackets, as long as they stay different."""
    short = [n.split(" (")[0].strip() or n for n in names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]
