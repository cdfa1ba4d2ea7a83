"""Plain text tables, and the notes beneath them."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads: the first two to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells):
        return "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def notes(said: Iterable[tuple[str, str]]) -> list[str]:
    """(what, note) pairs as a line per note, with the first few it is about."""
    about: dict[str, list[str]] = {}
    for what, note in said:
        about.setdefault(note, []).append(what)
    return [
        f"{note} ({len(names)}: {', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for note, names in about.items()
    ]
