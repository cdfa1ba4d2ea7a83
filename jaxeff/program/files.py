"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

NEW = ".new"  # what the name of a file ends with that is not whole yet


def write_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file in one go, so that a crash leaves the old one or none.

    Args:
        path: of the file; its folder is made where missing.
        write: is given the file to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + NEW)
    with new.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
