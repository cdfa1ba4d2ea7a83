"""Batches put on the devices by a background thread, ahead of the step.

While the devices compute one step, the thread reads and copies the next, so that
the step never waits for its data.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding


class _Raised(NamedTuple):
    error: BaseException


_END = object()


def prefetch(
    iterator: Iterable[Any], to: Sharding | jax.Device | None = None, depth: int = 2
) -> Iterator[Any]:
    """The same batches, in the same order, already on the devices.

    The thread starts with the first batch asked for. It stops with the last one,
    with an error, or as soon as the consumer is done: when the iterator returned
    here is closed or dropped.

    Args:
        iterator: trees of host arrays; each process gives its own part of a batch.
        to: where to. A sharding that spans several processes makes one global
            array of their parts; `None` is the default device.
        depth: how many batches may wait on the devices, at least 1.

    Raises:
        ValueError: `depth` below 1. While iterating: whatever `iterator` raises,
            at the place where its next batch was due; a batch that does not
            divide among the devices.
    """
    if depth < 1:
        raise ValueError(f"depth counts waiting batches, so at least 1, got {depth}.")
    return _consume(iterator, to, depth)


def _consume(iterator: Iterable[Any], to: Any, depth: int) -> Iterator[Any]:
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(
        target=_produce, args=(iterator, to, ready, stop), name="prefetch", daemon=True
    )
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        stop.set()
        # The thread may be waiting for room in the queue. It looks at `stop` before
        # each item, so it puts at most one more, for which there is room then.
        while not ready.empty():
            ready.get()
        thread.join()


def _produce(
    iterator: Iterable[Any], to: Any, ready: queue.Queue[Any], stop: threading.Event
) -> None:
    last: Any = _END
    try:
        source = iter(iterator)
        try:
            while not stop.is_set() and (batch := next(source, _END)) is not _END:
                ready.put(jax.tree.map(lambda x: _put(x, to), batch))
        finally:
            # A generator's own clean-up must not wait for the garbage collector.
            if hasattr(source, "close"):
                source.close()
    except BaseException as error:  # all of them: the consumer raises it again
        last = _Raised(error)
    if not stop.is_set():
        ready.put(last)


def _put(x: Any, to: Any) -> jax.Array:
    if isinstance(to, Sharding) and not to.is_fully_addressable:
        return jax.make_array_from_process_local_data(to, x)
    return jax.device_put(x, to)
