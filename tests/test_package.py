"""What `import jaxeff` alone gives."""

import subprocess
import sys
from pathlib import Path

import pytest

import jaxeff

PACKAGES = sorted(
    p.parent.name for p in Path(jaxeff.__file__).parent.glob("*/__init__.py")
)


def test_every_package_is_there_without_an_import_of_its_own():
    program = f"import jaxeff\nfor name in {PACKAGES}: print(getattr(jaxeff, name))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) == len(PACKAGES)
    assert {*PACKAGES} <= {*dir(jaxeff)}


def test_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'purning'"):
        _ = jaxeff.purning
