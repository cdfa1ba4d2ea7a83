"""Starts a program several times on this machine, as the processes of one job.

    python scripts/launch.py --processes 4 -- scripts/train.py --data digits --steps 500

The processes find one another by the three variables that `jaxeff.training.cli`
reads; clusters set them themselves (Slurm, Open MPI, Cloud TPU), and need no launcher.
Each line of a process but the first is marked with its number. When one fails, the
others have --grace seconds to notice; then they are ended. The status is that of the
first that failed.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from signal import SIG_IGN, signal, Signals, SIGTERM
from types import FrameType
from typing import IO

from jaxeff.training.cli import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options, before `--` and the program."""

    processes: int = 2
    """How many."""
    devices: int | None = None
    """Virtual CPU devices of each process; by default one, or its accelerators."""
    grace: float = 60.0
    """Seconds that the others have after one has failed."""


def environment(c: Config, index: int, address: str) -> dict[str, str]:
    """What process `index` is told."""
    job = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(c.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if c.devices is not None:
        job |= {"JAX_NUM_CPU_DEVICES": str(c.devices), "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **job}


def free_address() -> str:
    """An address of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def passed_on(source: IO[str], to: IO[str], mark: str) -> threading.Thread:
    """A thread that copies lines, marked, as they come."""

    def copy() -> None:
        for line in source:
            to.write(mark + line)
            to.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def stopped(number: int, frame: FrameType | None) -> None:
    """What a signal does: the program ends by its `finally`, and its processes too."""
    signal(number, SIG_IGN)  # a second one would cut that short
    raise SystemExit(128 + number)


def launch(c: Config, command: list[str]) -> int:
    """Runs the job; the status of the first process that failed, or 0."""
    if c.processes < 1:
        raise ValueError(f"--processes is 1 or more, got {c.processes}.")
    if not command:
        raise ValueError(
            "a program is given after --, as in: launch.py --processes 2 -- "
            "scripts/train.py --steps 100."
        )
    address = free_address()
    job, threads = [], []
    signal(SIGTERM, stopped)
    try:
        for index in range(c.processes):
            # The first speaks for all, and may draw a bar.
            pipe = None if index == 0 else subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment(c, index, address),
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            job.append(process)
            outputs = (process.stdout, sys.stdout), (process.stderr, sys.stderr)
            for source, to in outputs:
                if source is not None:
                    threads.append(passed_on(source, to, f"[{index}] "))
        return waited(job, c.grace)
    finally:
        for process in job:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()


def waited(job: list[subprocess.Popen], grace: float) -> int:
    """Waits for all, and after a failure only for so long."""
    ended = lambda: [process.poll() for process in job]
    while None in ended() and not any(ended()):
        time.sleep(0.05)
    if not any(ended()):
        return 0
    failed = next(i for i, status in enumerate(ended()) if status)
    since = time.monotonic()
    while None in ended() and time.monotonic() - since < grace:
        time.sleep(0.05)
    status = job[failed].returncode
    how = f"with status {status}" if status > 0 else f"by {Signals(-status).name}"
    print(
        f"error: process {failed} of {len(job)} ended {how}, and the job with it.",
        file=sys.stderr,
        flush=True,
    )
    # Of a signal, what a shell makes of it.
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    program = sys.argv[at + 1 :]
    main(
        lambda c: sys.exit(launch(c, program)),
        Config,
        description=__doc__,
        args=sys.argv[1:at],
    )
