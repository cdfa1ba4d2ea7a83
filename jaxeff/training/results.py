"""What a benchmark leaves behind: numbers, and where and with what they were measured.

A number without its device, versions and date cannot be compared with another.
"""

import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxeff.cost import processor
from jaxeff.program import write_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What changes how fast the same program runs.
ENVIRONMENT = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "GLIBC_TUNABLES")


def about() -> dict[str, Any]:
    """Device, versions and date, as JSON holds them."""
    device = jax.devices()[0]
    return {
        "date": date.today().isoformat(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "runtime": device.client.platform_version.splitlines()[0],
        "processor": processor().name or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all; its folder is made where missing."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def rows_so_far(path: str | Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a results file, for a benchmark that goes on from there.

    Args:
        path: of a file `{"options": ..., "rows": [...]}`; none has no rows.
        options: all that decides a row's numbers.

    Raises:
        ValueError: the file was begun with other options.
    """
    path = Path(path)
    found = json.loads(path.read_text()) if path.is_file() else {}
    # As they come back from a file: its lists may have been tuples.
    now = json.loads(json.dumps(options))
    if found and found["options"] != now:
        raise ValueError(
            f"{path} holds rows made with {found['options']}, and now it is {now}. "
            "Name another --output."
        )
    return found.get("rows", [])
