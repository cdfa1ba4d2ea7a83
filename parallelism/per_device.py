"""Transforms of which each device has a state of its own, inside of `shard_map`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
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


@pytree
class Apart(PerDevice):
    """State of a transform of each device's own gradient, from `apart`."""


def apart(
    tx: optax.GradientTransformation, *, devices: int
) -> optax.GradientTransformation:
    """A transform of each device's own gradient, with a state of its own.

    It comes before what averages. Compression passes on later what it left out, which
    adds up where all after it is linear, as momentum is; Adam's division is not, so it
    goes here. A device sees a part of the batch alone, where noise makes the root mean
    square larger by up to the root of the number of devices; so the learning rate of
    AdamW is multiplied by that:

        divided = optax.scale_by_rms(0.99, eps_in_sqrt=False, bias_correction=True)
        tx = optax.chain(
            apart(divided, devices=8),
            powersgd(4, devices=8),
            optax.ema(0.9),
            optax.scale_by_learning_rate(8**0.5 * 1e-3),
        )

    Source: after Chen et al. 2022, arXiv:2205.14473 (Efficient-Adam), where momentum
        too comes before the sending.

    Args:
        tx: what each device does to its gradient.
        devices: of the axis that shares the batch.

    Raises:
        ValueError: there is no device.
    """
    check_devices(devices)

    def init(params: Any) -> Any:
        each = lambda a: jnp.broadcast_to(a, (devices, *jnp.shape(a)))
        return Apart(jax.tree.map(each, tx.init(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        own = jax.tree.map(lambda a: a[0], state.values)
        updates, own = tx.update(updates, own, params)
        return updates, Apart(jax.tree.map(lambda a: a[None], own))

    return optax.GradientTransformation(init, update)


def state_specs(state: PyTree, axis: str = "data") -> PyTree:
    """For `shard_map`: which parts of a state differ between the devices of an axis."""
    one = lambda x: isinstance(x, PerDevice)
    return jax.tree.map(lambda x: P(axis) if one(x) else P(), state, is_leaf=one)


class Averaged(NamedTuple):
    """The state of what averages and keeps nothing."""


def averages(state: PyTree) -> bool:
    """Whether something in an optimizer, by its state, averages over devices."""
    ours = lambda x: isinstance(x, PerDevice | Averaged)
    found = [x for x in jax.tree.leaves(state, is_leaf=ours) if ours(x)]
    return any(not isinstance(x, Apart) for x in found)


def check_state(state: PyTree, devices: int, axis: str = "data") -> None:
    """Refuses a state that the devices of an axis cannot share.

    Raises:
        ValueError: it was made for another number of devices; or what gathers from
            gradients comes before what averages them, so that each device would gather
            something else, and one of them would be taken for all.
    """
    one = lambda x: isinstance(x, PerDevice)
    parts = [x for x in jax.tree.leaves(state, is_leaf=one) if one(x)]
    for n in sorted({x.shape[0] for x in jax.tree.leaves(parts)} - {devices}):
        raise ValueError(
            f"the transform was made for {n} devices, but the axis {axis} has "
            f"{devices}. Make it for {devices}."
        )
    early = _before_average(state)
    if early is not None:
        raise ValueError(
            f"{early} keeps what it gathers from gradients, and stands before what "
            "averages these: each device would keep something else. Put it behind, or "
            "inside of parallelism.apart."
        )


def _before_average(state: PyTree) -> str | None:
    """The kind of a state in a chain that gathers before anything averages."""
    if type(state) is not tuple:  # as `optax.chain` makes it
        return None
    for part in state:
        if averages(part):
            return _before_average(part)
        one = lambda x: isinstance(x, PerDevice)
        for x in jax.tree.leaves(part, is_leaf=one):
            if not one(x) and jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 1:
                return type(part).__name__
    return None


def place_state(state: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """A state on its devices: each has its own part, and the rest whole.

    Raises:
        ValueError: it was made for another number of devices, see `check_state`.
    """
    check_state(state, mesh.shape[axis], axis)
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
