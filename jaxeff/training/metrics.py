"""Metrics of a run as JSON lines, and on request as TensorBoard events.

`metrics.jsonl` holds one object per line, with `step` first. A line is flushed as
it is written, so a killed run keeps all but perhaps its last.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxeff.program import write_file

from .extras import require


class Metrics:
    """Writes the metrics of one run; only process 0 does.

    Law: a run that resumes at step s leaves the file that a run without a break
    would have left.
    """

    def __init__(
        self, folder: str | Path, *, start_step: int = 0, tensorboard: bool = False
    ):
        """Opens the files, and drops what an earlier run wrote after `start_step`.

        Args:
            folder: gets `metrics.jsonl` and, on request, the folder `tensorboard`.
            start_step: the step the run begins with; 0 starts anew.
            tensorboard: write events too; needs the package tensorboardX.

        Raises:
            ValueError: events asked for and tensorboardX missing; see `check_events`.
        """
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        folder = Path(folder)
        # Before anything is written, as it may fail.
        writer = _summary_writer() if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _truncate(path, start_step)
        self._file = path.open("a")
        if writer is not None:
            events = str(folder / "tensorboard")
            self._events = writer(events, purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; values that JSON cannot hold (inf, nan) become null."""
        if self._file is None:
            return
        numbers = {k: float(v) for k, v in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last line that was cut short."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step > 0]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_file(path, lambda file: file.write(text.encode()))


def check_events() -> None:
    """Refuses TensorBoard events where tensorboardX is missing.

    Raises:
        ValueError: it is; says how to install it.
    """
    require("tensorboardX", "TensorBoard events")


def _summary_writer() -> Any:
    check_events()
    from tensorboardX import SummaryWriter

    return SummaryWriter
