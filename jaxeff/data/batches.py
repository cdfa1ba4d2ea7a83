"""Shuffled batches that a run can take up again at any step.

The order of an epoch depends on (seed, epoch) alone and step s is batch
`s % steps_per_epoch` of epoch `s // steps_per_epoch`, so the state of the
pipeline is one integer, the step.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from .dataset import Dataset


class Batch(NamedTuple):
    """What a loss function receives: some images and their labels."""

    images: Float[np.ndarray | jax.Array, "batch height width channels"]
    labels: Int[np.ndarray | jax.Array, " batch"]


class Share(NamedTuple):
    """This process's rows of every global batch."""

    batch_size: int
    rows: slice


def check_batch(
    batch_size: int, process_index: int | None, process_count: int | None
) -> Share:
    """The rows of a global batch that this process loads.

    Raises:
        ValueError: the batch does not divide among the processes.
    """
    processes = jax.process_count() if process_count is None else process_count
    index = jax.process_index() if process_index is None else process_index
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            f"batch_size counts the examples of all processes together, so it must be "
            f"a positive multiple of {processes}, got {batch_size}."
        )
    local = batch_size // processes
    return Share(batch_size, slice(index * local, (index + 1) * local))


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Whole batches in one pass over the data."""
    return len(dataset) // batch_size


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    steps: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Batches of a new random order in each epoch.

    What is left of an epoch after its last whole batch is passed over; the next
    epoch's order is another, so every example is seen.

    Law: `batches(..., start_step=s)` gives what `batches(...)` gives after s steps.

    Args:
        dataset: to draw from.
        batch_size: examples per step, over all processes together.
        seed: of the orders.
        start_step: the step to begin with, to resume a run.
        steps: how many to give; `None` never ends.
        process_index, process_count: which part of each batch to give; JAX's own.

    Raises:
        ValueError: the batch is larger than the data set, or does not divide
            among the processes.
    """
    share = check_batch(batch_size, process_index, process_count)
    if batch_size > len(dataset):
        raise ValueError(
            f"a batch holds at most the whole data set, but batch_size is "
            f"{batch_size} and {dataset.name} has {len(dataset)} examples. "
            "Choose a smaller batch_size."
        )
    return islice(_batches(dataset, share, seed, start_step), steps)


def _batches(
    dataset: Dataset, share: Share, seed: int, start_step: int
) -> Iterator[Batch]:
    per_epoch = steps_per_epoch(dataset, share.batch_size)
    epoch, order = -1, np.arange(0)
    for step in count(start_step):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
        first = step % per_epoch * share.batch_size
        rows = order[first : first + share.batch_size][share.rows]
        yield Batch(dataset.images[rows], dataset.labels[rows])
