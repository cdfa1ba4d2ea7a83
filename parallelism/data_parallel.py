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


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch as global arrays, each device holding its part of the examples.

    Args:
        batch: a tree of host arrays whose first dim counts examples. With several
            processes, each passes its own part, and the global batch is their parts
            in order of the process.
        mesh: from `make_mesh`.

    Raises:
        ValueError: the examples do not divide among the devices.
    """

    def put(x):
        sharding = batch_sharding(mesh, x.shape[0] * jax.process_count())
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)
