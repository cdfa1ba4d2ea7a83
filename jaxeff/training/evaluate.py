"""Accuracy of a function on a data set, counted exactly."""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxeff.data import Dataset


def accuracy(
    fn: Callable[..., Array],
    params: PyTree,
    dataset: Dataset,
    batch_size: int = 500,
    *,
    to: Sharding | jax.Device | None = None,
) -> float:
    """The fraction of images whose largest logit is their label's.

    The last batch is filled up with repeats that do not count, so one program
    serves all. It is compiled once for each `fn`: pass the same object again.

    Args:
        fn: `fn(params, images) -> logits`, hashable.
        params: its parameters.
        dataset: with at least one image.
        batch_size: images at a time.
        to: where each batch goes, if not to the default device; with several
            processes each passes the whole data set.

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size counts images, so at least 1, got {batch_size}.")
    n = len(dataset)
    if to is None:
        batch_size = min(batch_size, n)  # with a sharding it has to divide as given

    def counts() -> Iterator[Array]:
        for first in range(0, n, batch_size):
            # Beyond the end: the last image again, masked out.
            rows = np.minimum(np.arange(first, first + batch_size), n - 1)
            real = np.arange(first, first + batch_size) < n
            batch = (dataset.images[rows], dataset.labels[rows], real)
            batch = batch if to is None else jax.device_put(batch, to)
            yield _count_correct(fn, params, *batch)

    return int(sum(one_behind(counts()))) / n


def one_behind(results: Iterable[Array]) -> Iterator[float]:
    """Reads each result while the next is computed.

    A device then never waits for the host, nor do batches pile up on it. On CPU
    devices, programs queued without end starve each other of threads, and XLA ends
    the process when devices have not met within 40 s.

    Args:
        results: numbers, each computed (asynchronously) when it is asked for.
    """
    before = None
    for result in results:
        if before is not None:
            yield before.item()
        before = result
    if before is not None:
        yield before.item()


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(
    fn: Callable[..., Array],
    params: PyTree,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    real: Bool[Array, " batch"],
) -> Int[Array, ""]:
    correct = jnp.argmax(fn(params, images), axis=-1) == labels
    return jnp.sum(correct & real)
