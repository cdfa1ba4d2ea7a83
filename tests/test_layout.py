"""The package holds what the folders hold, and is typed, in a wheel as on disk."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxeff.models
import jaxeff.parallelism

ROOT = Path(__file__).resolve().parents[1]
LINKED = ["models", "parallelism"]


@pytest.mark.parametrize("name", LINKED)
def test_the_package_links_to_the_folder_at_the_top(name):
    link = ROOT / "jaxeff" / name
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_the_linked_folders_are_imported_by_their_full_names(name):
    assert getattr(jaxeff, name).__name__ == f"jaxeff.{name}"
    assert name not in sys.modules


def test_a_wheel_holds_every_module_as_a_real_file(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {
            info.filename: archive.read(info)
            for info in archive.infolist()
            if ".dist-info/" not in info.filename
        }
    # `rglob` does not follow links, so the linked folders are listed for themselves.
    sources = {
        f"{prefix}{file.relative_to(folder).as_posix()}": file
        for folder, prefix in [
            (ROOT / "jaxeff", "jaxeff/"),
            *((ROOT / name, f"jaxeff/{name}/") for name in LINKED),
        ]
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == {name: file.read_bytes() for name, file in sources.items()}


def test_types_are_checked_in_every_package_but_the_one_that_says_why():
    options = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"--jaxtyping-packages=([\w.,]+)", options)[1].split(",")
    parts = {path.stem for path in (ROOT / "jaxeff").iterdir()}
    parts -= {"__init__", "__pycache__", "program"}
    assert {f"jaxeff.{name}" for name in parts} <= set(listed)
