"""Plain text as bytes: 256 tokens, no tokenizer, nothing unknown."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from .batches import check_batch, Share
from .files import read


def text(
    path: str | Path, *, train_fraction: float = 0.9
) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, " m"]]:
    """The first part of a file for training, the rest for validation.

    Args:
        path: plain, .gz or .xz, in any encoding: tokens are its bytes.
        train_fraction: of the bytes, in (0, 1).

    Raises:
        ValueError: the file is missing, corrupt, or too short to split.
    """
    if not 0 < train_fraction < 1:
        raise ValueError(
            f"train_fraction lies between 0 and 1, got {train_fraction}. 0.9 trains on "
            "all but the last tenth."
        )
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"a text must be one file, but {path} is "
            f"{'a folder' if path.is_dir() else 'missing'}. Name the file itself."
        )
    tokens = np.frombuffer(read(path), np.uint8)
    cut = int(len(tokens) * train_fraction)
    if not 0 < cut < len(tokens):
        raise ValueError(
            f"{path} has {len(tokens)} bytes, too few to split at {train_fraction}. "
            "Name a longer text."
        )
    return tokens[:cut], tokens[cut:]


def windows(
    tokens: UInt8[np.ndarray, " n"],
    batch_size: int,
    length: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    steps: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Int[np.ndarray, "batch {length}+1"]]:
    """Batches of windows that start anywhere in `tokens`, as int32.

    A window has `length + 1` tokens: inputs `w[:, :-1]`, targets `w[:, 1:]`. Step
    s depends on (seed, s) alone, so a run resumes at any step.

    Args:
        tokens: as `text` gives them.
        batch_size: windows per step, over all processes together.
        length: of the inputs, in tokens.
        seed: of the starts.
        start_step: the step to begin with.
        steps: how many to give; `None` never ends.
        process_index, process_count: which part of each batch to give; JAX's own.

    Raises:
        ValueError: the text is shorter than one window, or the batch does not
            divide among the processes.
    """
    share = check_batch(batch_size, process_index, process_count)
    if not 1 <= length < len(tokens):
        raise ValueError(
            f"a window takes length + 1 = {length + 1} tokens and at least 2, but the "
            f"text has {len(tokens)}. Choose a length from 1 to {len(tokens) - 1}."
        )
    made = (_window(tokens, share, length, seed, s) for s in count(start_step))
    return islice(made, steps)


def _window(
    tokens: UInt8[np.ndarray, " n"], share: Share, length: int, seed: int, step: int
) -> Int[np.ndarray, "batch {length}+1"]:
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(tokens) - length, size=share.batch_size)
    where = starts[share.rows, None] + np.arange(length + 1)
    return tokens[where].astype(np.int32)
