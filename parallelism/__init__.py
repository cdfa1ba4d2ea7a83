"""Meshes, and the ways to spread one model over many devices."""

from .data_parallel import (
    batch_sharding as batch_sharding,
    replicate as replicate,
    shard_batch as shard_batch,
)
from .mesh import make_mesh as make_mesh
