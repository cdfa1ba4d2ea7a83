"""Bytes of a data file, plain or compressed, with one clear error for a bad one.

Readers ask for a file by its plain name and get it from `name`, `name.gz` or
`name.xz`, whichever is there.
"""

import gzip
import lzma
import zlib
from pathlib import Path

SUFFIXES = ("", ".gz", ".xz")  # in order of preference


def check_folder(folder: str | Path, *, expects: str) -> Path:
    """The folder as a `Path`.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"a data folder must exist, but {folder} is "
            f"{'a file' if folder.exists() else 'missing'}. "
            f"Name the folder that holds {expects}."
        )
    return folder


def find(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, plain, .gz or .xz.

    Raises:
        ValueError: none of the three is there.
    """
    for suffix in SUFFIXES:
        if (path := folder / (name + suffix)).is_file():
            return path
    raise ValueError(
        f"{folder} must hold {name} (plain, .gz or .xz), but it has none of them. "
        "Download the file, or name another folder."
    )


def read(path: Path) -> bytes:
    """The whole content of `path`, unpacked as its suffix says.

    Raises:
        ValueError: the file cannot be read, is not what its suffix says, is
            truncated, or fails its checksum.
    """
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    # A gzip stream that fails its checksum is a BadGzipFile, an OSError.
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} must be a readable{_kind(path)} file, but: {error}. "
            "It is truncated, corrupt or of another kind: fetch it again."
        ) from error


def _kind(path: Path) -> str:
    return {".gz": " gzip", ".xz": " xz"}.get(path.suffix, "")
