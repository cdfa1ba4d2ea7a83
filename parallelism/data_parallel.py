"""Data parallelism: every device holds the model and takes its part of the batch.

No code of its own runs in the step. With the state replicated and the batch
sharded, the compiler sums the gradients over the devices of all processes, and
one device is the same program with nothing to sum:

    mesh = make_mesh()
    state = replicate(init_state(params, tx, key), mesh)
    data = prefetch(batches(train, batch_size), batch_sharding(mesh, batch_size))

Means over the batch (a loss, the statistics of batch norm) are means over the
whole batch, not over one device's part of it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .mesh import BATCH_AXES


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with every array whole on every device of the mesh.

    With several processes, each passes the same values.
    """
    # Keys go as the integers they are made of: JAX does not copy a key to the devices
    # of other processes.
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = jax.tree.map(lambda x: jr.key_data(x) if is_key(x) else x, tree)
    raw = jax.device_put(raw, NamedSharding(mesh, P()))
    wrap = lambda x, y: jr.wrap_key_data(y, impl=jr.key_impl(x)) if is_key(x) else y
    return jax.tree.map(wrap, tree, raw)


def replicate_rest(tree: Any, mesh: Mesh) -> Any:
    """The tree with every array whole on every device, but those on the mesh already.

    For a state whose weights `shard` or `fully_shard` has placed: the optimizer's
    moments lie like them, while its counters are still on one device.
    """

    def put(x):
        lies = getattr(x, "sharding", None)
        there = isinstance(lies, NamedSharding) and lies.mesh == mesh
        return x if there else replicate(x, mesh)

    return jax.tree.map(put, tree)


def batch_sharding(mesh: Mesh, batch_size: int | None = None) -> NamedSharding:
    """Splits the first dim of an array over the axes whose devices share the batch.

    They are `data`, `fsdp` and `expert`, as far as the mesh has them.

    Args:
        mesh: from `make_mesh`.
        batch_size: examples per step over all processes, to check it before any
            data is read.

    Raises:
        ValueError: `batch_size` does not divide among the devices.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    shards = math.prod(mesh.shape[name] for name in axes)
    if batch_size is not None and (batch_size < 1 or batch_size % shards):
        raise ValueError(
            f"the devices of {', '.join(axes)} share each batch evenly, but a batch "
            f"of {batch_size} does not divide by {shards}. Choose a multiple of "
            f"{shards}."
        )
    return NamedSharding(mesh, P(axes))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process loads, and of how many.

        index, count = batch_share(mesh)
        batches(train, batch_size, process_index=index, process_count=count)

    Processes whose devices differ only along axes that do not share the batch, such as
    `tensor` and `pipe`, load the same part.

    Args:
        mesh: from `make_mesh`.

    Raises:
        ValueError: the mesh has no device of this process, or the examples of two
            processes overlap in part.
    """
    spread = batch_sharding(mesh)
    parts = spread.num_devices // math.prod(
        n for name, n in mesh.shape.items() if name not in BATCH_AXES
    )
    held: dict[int, set[int]] = {}
    for device, (rows,) in spread.devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).update(range(parts)[rows])
    return _share(held, jax.process_index())


def _share(held: dict[int, set[int]], process: int) -> tuple[int, int]:
    """The share of a process, where each holds some of the parts of a batch."""
    if process not in held:
        raise ValueError(
            f"the mesh has devices of processes {sorted(held)}, and none of process "
            f"{process}, which has nothing to load for it."
        )
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    whole = [part for share in shares for part in share]
    if whole != list(range(len(whole))) or len({len(s) for s in shares}) > 1:
        raise ValueError(
            "each process loads one run of examples of every batch, as long as that of "
            f"any other, but of {max(whole) + 1} parts the processes hold {shares}. "
            "Choose sizes of the mesh that divide the devices of a process, or are "
            "multiples of them."
        )
    return shares.index(tuple(sorted(held[process]))), len(shares)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch as global arrays, each device holding its part of the examples.

    Args:
        batch: a tree of host arrays whose first dim counts examples. With several
            processes, each passes its `batch_share`.
        mesh: from `make_mesh`.

    Raises:
        ValueError: an array has no dim of examples, or they do not divide among the
            devices; or as `batch_share`.
    """
    _, count = batch_share(mesh)

    def put(x):
        if np.ndim(x) < 1:
            raise ValueError(
                f"the first dim of every array of a batch counts examples, but one is "
                f"the scalar {x}. Leave it out, or give it for each example."
            )
        sharding = batch_sharding(mesh, x.shape[0] * count)
        whole = (x.shape[0] * count, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, whole)

    return jax.tree.map(put, batch)
