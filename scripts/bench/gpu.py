"""What one GPU reaches: training, products, compressed models, the tests marked gpu.

    PYTHONPATH=. python scripts/bench/gpu.py

It takes JAX with its GPU support, Flax, optax and NumPy; of all else that jaxeff is
built on only jaxtyping, the small pure-Python package in which its shapes are written
(`pip install jaxtyping`). Nothing is installed and no data are read. Each part runs in
a process of its own, so its peak memory is its own and a failure costs no other part;
all together they stay below six minutes. Exits 1 where a part fails or computes
something else than it should, and 2 where there is no GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

try:
    import jax

    from jaxeff.models import LLAMA_1B
    from jaxeff.training.results import about, write_json
    from scripts.bench.gpu_parts import (
        measure_forward,
        measure_products,
        measure_training,
    )
except ModuleNotFoundError as error:
    missing = (error.name or "").split(".")[0]
    ours = missing in ("jaxeff", "scripts")
    way_out = (
        "Run it with PYTHONPATH=. from the top of the repository"
        if ours
        else f"pip install {missing}"
    )
    print(f"error: there is no package {missing} here. {way_out}.", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 345.0  # for all parts together
NO_GPU = 2
WORKLOADS = {"1 token": (1, 1), "8 x 1024 tokens": (8, 1024)}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """A training step of a LLaMA of 1.1 billion parameters."""
    return measure_training(
        LLAMA_1B,
        batch_size=options.batch_size,
        sequence=options.sequence,
        steps=options.steps,
        peak=None if options.peak is None else 1e12 * options.peak,
    )


def multiply(options: argparse.Namespace) -> dict[str, Any]:
    """Matrix products in bf16, int8 and fp8."""
    return measure_products(options.sizes, calls=10, repeats=20, max_seconds=8.0)


def forward(options: argparse.Namespace) -> dict[str, Any]:
    """The same LLaMA dense, shrunk and quantized."""
    return measure_forward(LLAMA_1B, workloads=WORKLOADS, repeats=50, max_seconds=8.0)


def test(options: argparse.Namespace) -> dict[str, Any]:
    """The tests marked gpu, where what they need is installed."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        said = f"not run: {' and '.join(missing)} not installed"
        print(f"tests: {said}")
        return {"said": said, "right": True}
    # Only the files that have such tests: others need packages of their own.
    files = [
        p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
    # What is new in this machine's JAX may warn; only failures count here.
    command += ["-W", "default", "-p", "no:cacheprovider"]
    if find_spec("beartype") is None:  # then shapes go unchecked
        command += ["-o", "addopts=--import-mode=importlib --strict-markers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    print("\n".join(lines[-30:] if done.returncode else lines[-1:]))
    return {"said": (lines or ["nothing"])[-1], "right": done.returncode == 0}


PARTS = {"training": train, "products": multiply, "forward": forward, "tests": test}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        print(f"error: {message}. See --help.", file=sys.stderr)
        sys.exit(2)


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, got {text!r}")
    return int(text)


def read_options(args: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line. By argparse, as tyro may not be there."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def option(name: str, default: Any, unit: str, **more: Any) -> None:
        parser.add_argument(
            f"--{name}", default=default, help=f"{unit} (default: %(default)s)", **more
        )

    option("parts", list(PARTS), "what to measure", nargs="+", choices=PARTS)
    option("batch-size", 8, "sequences per training step", type=count)
    option("sequence", 2048, "tokens in each", type=count)
    option("steps", 15, "training steps that are timed", type=count)
    option("sizes", [4096, 8192, 16384], "rows of the matrices", type=count, nargs="+")
    option("peak", None, "dense bf16 TFLOP/s, for a GPU not in the table", type=float)
    option("output", Path("benchmarks/gpu.json"), "file of the results", type=Path)
    # One part in this process; the program calls itself with it.
    parser.add_argument("--here", choices=["about", *PARTS], help=argparse.SUPPRESS)
    return parser.parse_args(args)


def in_process(
    part: str, args: list[str], seconds: float
) -> tuple[int, dict[str, Any]]:
    """One part in a process of its own: its exit status, and what it found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, __file__, *args, "--here", part]
        command += ["--output", str(path)]
        try:
            status = subprocess.run(command, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return 1, {"failed": f"it took more than {seconds:.0f} s", "right": False}
        if path.exists():
            return status, json.loads(path.read_text())
        return status, {"failed": f"exit status {status}", "right": False}


def here(part: str, options: argparse.Namespace) -> int:
    """One part in this process."""
    # To ask for the GPU is to take most of its memory, which the tests need.
    if part != "tests" and jax.default_backend() != "gpu":
        print(
            f"error: this measures a GPU, but JAX {jax.__version__} sees "
            f"{jax.device_count()} {jax.default_backend()} device(s). Run it on a host "
            "with a GPU and JAX for it, such as jax[cuda13].",
            file=sys.stderr,
        )
        return NO_GPU
    found = about() if part == "about" else PARTS[part](options)
    write_json(options.output, found)
    return 0


def main(args: list[str]) -> int:
    """Every part; returns the exit status."""
    options = read_options(args)
    if options.here is not None:
        return here(options.here, options)
    until = time.monotonic() + SECONDS
    status, results = in_process("about", args, SECONDS)
    if status:
        return status
    print(f"{results['device']}, {results['versions']}")
    for part in options.parts:
        began = time.monotonic()
        _, found = in_process(part, args, max(1.0, until - began))
        seconds = time.monotonic() - began
        results[part] = found | {"part_seconds": seconds}
        failed = f": {found['failed']}" if "failed" in found else ""
        print(
            f"{part}: {'right' if found['right'] else 'WRONG'}{failed}, {seconds:.0f} s"
        )
        write_json(options.output, results)
    print(options.output)
    return 0 if all(results[part]["right"] for part in options.parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
