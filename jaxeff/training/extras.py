"""Packages that jaxeff can do without: which extra brings one, and how to get it."""

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jaxeff


def require(module: str, what: str) -> None:
    """Refuses what needs a package that is not installed, before anything is made.

    Args:
        module: as it is imported.
        what: needs it, to begin the sentence.

    Raises:
        ValueError: it is missing; says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} need the package {module}. {advice(module)}")


def advice(module: str) -> str:
    """How to install a package, by the extra of jaxeff that brings it, if one does."""
    extra, checkout = extra_of(module), _checkout()
    pip = f"{Path(sys.executable).parent / 'pip'} install"
    if checkout is None or extra is None:
        what = module if extra is None else f"'jaxeff[{extra}]'"
        return f"Install it: {pip} {what}"
    if Path(sys.prefix) == checkout / ".venv":
        pip = ".venv/bin/pip install"
    return f"Install it: {pip} -e '.[{extra}]'"


def extra_of(module: str) -> str | None:
    """The extra of jaxeff that brings a package; None if none does."""
    for extra, requirement in _optional():
        name = re.match(r"[\w.-]+", requirement)
        if name is not None and name[0].lower() == module.lower():
            return extra
    return None


def _checkout() -> Path | None:
    """The folder of jaxeff's source, where it runs from there."""
    folder = Path(jaxeff.__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


def _optional() -> Iterator[tuple[str, str]]:
    """Each extra with each of its requirements."""
    if (checkout := _checkout()) is not None:
        project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
        for extra, requirements in project["optional-dependencies"].items():
            yield from ((extra, r) for r in requirements)
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("jaxeff") or []:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
            if extra is not None:
                yield extra[1], requirement
