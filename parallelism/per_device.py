"""Transforms of which each device has a state of its own, inside of `shard_map`."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from jaxeff.tree import pytree

from .data_parallel import replicate


@pytree
class PerDevice:
    """State that differs between the devices of an axis.

    Attributes:
        values: arrays (devices, ...), of which each device holds its own.
    """

    values: PyTree


def state_specs(state: PyTree, axis: str = "data") -> PyTree:
    """For `shard_map`: which parts of a state differ between the devices of an axis."""
    one = lambda x: isinstance(x, PerDevice)
    return jax.tree.map(lambda x: P(axis) if one(x) else P(), state, is_leaf=one)


class Averaged(NamedTuple):
    """The state of what averages and keeps nothing."""


def averages(state: PyTree) -> bool:
    """Whether something in an optimizer, by its state, averages over devices."""
    ours = lambda x: isinstance(x, PerDevice | Averaged)
    return any(map(ours, jax.tree.leaves(state, is_leaf=ours)))


def place_state(state: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """A state on its devices: each has its own part, and the rest whole."""
    one = lambda x: isinstance(x, PerDevice)
    own = NamedSharding(mesh, P(axis))
    put = lambda x: jax.device_put(x, own) if one(x) else replicate(x, mesh)
    return jax.tree.map(put, state, is_leaf=one)


def check_devices(devices: int) -> None:
    """Refuses an axis without a device."""
    if devices < 1:
        raise ValueError(f"an axis has 1 device or more, got devices={devices}.")


def check_axis(axis: str, devices: int) -> None:
    """Refuses another number of devices than the transform was made for."""
    # JAX says so where there is no such axis.
    if (n := jax.lax.axis_size(axis)) != devices:
        raise ValueError(
            f"the transform was made for {devices} devices, but the axis {axis} has "
            f"{n}. Make it for {n}."
        )
