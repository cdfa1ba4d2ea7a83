"""A program from a function and its options: bad input is one line and status 2.

The options are the fields of a frozen, keyword-only dataclass; tyro reads them and
writes `--help`. The library says what is wrong as a `ValueError` with the rule, the
numbers and the way out; here it becomes that line on stderr. Set JAXEFF_TRACEBACK=1
to see where it came from.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from .extras import advice, extra_of

Config = TypeVar("Config")

BAD_INPUT = 2
# What a shell gives for a program that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130


def main(
    run: Callable[[Config], Any],
    config: type[Config],
    *,
    description: str | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parses the command line and calls `run(config)`.

    Prints one line and exits with status 2 where an option is unknown or malformed,
    where `run` raises a `ValueError` or an `OSError`, and where it needs a package
    of an extra that is not installed.

    Args:
        run: the program.
        config: a dataclass; the docstring or comment of each field is its help.
        description: begins `--help`; the docstring of `config` by default.
        args: in place of `sys.argv[1:]`.

    Raises:
        SystemExit: bad input, or Ctrl-C.
    """
    try:
        run(parse(config, description=description, args=args))
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does; there is no one to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except ImportError as error:
        # A package that jaxeff can do without; any other is a fault of ours.
        if error.name is None or extra_of(error.name) is None:
            raise
        _stop(f"this needs the package {error.name}. {advice(error.name)}")
    except (ValueError, OSError) as error:
        if os.environ.get("JAXEFF_TRACEBACK"):
            raise
        _stop(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def parse(
    config: type[Config],
    *,
    description: str | None = None,
    args: Sequence[str] | None = None,
) -> Config:
    """The options of the command line; see `main`.

    Raises:
        ValueError: an option is unknown, lacks its value or has a bad one.
        SystemExit: after `--help`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, unknown = tyro.cli(
                config, args=args, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_first_part(said.getvalue())} See --help.") from None
    if unknown:
        raise ValueError(_unknown(unknown[0], config))
    return options


def _unknown(given: str, config: Any) -> str:
    if not given.startswith("-"):
        return (
            f"options are given by name, but {given!r} stands alone. "
            "Write --option value; --help lists the options."
        )
    known = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config)]
    given = given.split("=")[0]
    near = difflib.get_close_matches(given, known, n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"there is no option {given}.{hint} --help lists the {len(known)} options."


def _first_part(box: str) -> str:
    """The message in the box that tyro draws around it, as one line."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if text and set(text) <= set("─-"):
            parts.append([])
        elif not line.startswith(("╭", "╰")):
            parts[-1].append(text)
    # The frame holds the title; where there are no such characters, a part does.
    message = parts[0] if "╭" in box else parts[min(1, len(parts) - 1)]
    said = " ".join(filter(None, message)) or "the options cannot be read."
    return said.split(" Got errors:")[0]


def _stop(message: str) -> None:
    """The message as one line on stderr, then the end."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(BAD_INPUT)


def check_same_options(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: Path,
    may_change: Collection[str] = (),
) -> None:
    """Refuses to go on with a run by other options than it began with.

    Args:
        before, now: options by the names of their fields, as JSON gives them back.
        folder: of the run.
        may_change: names of those that may differ.

    Raises:
        ValueError: some differ; says which.
    """
    differ = [
        f"{option_name(name)} {before[name]}, and now it is {now[name]}"
        for name in before
        if name in now and name not in may_change and before[name] != now[name]
    ]
    if differ:
        raise ValueError(
            f"a run goes on with the options it began with, but the one in {folder} "
            f"has {'; '.join(differ)}. Give the same again, or name another --output."
        )


def option_name(field: str) -> str:
    """A field of a config as it is written on the command line."""
    return "--" + field.replace("_", "-")


def join_processes(environment: Mapping[str, str] | None = None) -> bool:
    """Makes the processes of one job see each other, where there are several.

    Which they are, the launcher says: JAX_COORDINATOR_ADDRESS ("host:port"),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; or Slurm's `srun`, Open MPI's `mpirun`, or
    Cloud TPU's TPU_WORKER_HOSTNAMES. Call it before anything asks for a device.

    Args:
        environment: in place of `os.environ`.

    Returns:
        Whether the job has several processes.

    Raises:
        ValueError: some of the three variables are missing, or not of that form.
    """
    given = os.environ if environment is None else environment
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if "JAX_COORDINATOR_ADDRESS" in given:
        numbers = [given.get(name, "") for name in names[1:]]
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"a process of several is told {', '.join(names)}, but the last two "
                f"are {' and '.join(map(repr, numbers))}. Set both to whole numbers."
            )
        address = given[names[0]]
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
            raise ValueError(
                f"{names[0]} is host:port, got {address!r}. Add a free port, as in "
                "localhost:12345."
            )
        count, index = map(int, numbers)
        jax.distributed.initialize(address, count, index)
        return count > 1
    several = (
        _number(given, "SLURM_NTASKS") > 1 and "SLURM_LOCALID" in given,
        _number(given, "OMPI_COMM_WORLD_SIZE") > 1,
        "," in given.get("TPU_WORKER_HOSTNAMES", ""),
    )
    if any(several):
        jax.distributed.initialize()
    return any(several)


def _number(given: Mapping[str, str], name: str) -> int:
    value = given.get(name, "")
    return int(value) if value.isdecimal() else 0
