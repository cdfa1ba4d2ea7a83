"""One mesh for every kind of parallelism; an axis of size 1 is switched off."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "tensor", "pipe")


def make_mesh(
    *,
    data: int | None = None,
    tensor: int = 1,
    pipe: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """All devices of all processes as a mesh with the axes data, tensor and pipe.

    Args:
        data: copies of the model that share the batch; `None` takes all devices
            that the other two axes leave.
        tensor: devices that share each layer.
        pipe: devices that share the depth.
        devices: in place of `jax.devices()`.

    Raises:
        ValueError: the product of the sizes is not the number of devices.
    """
    have = jax.device_count() if devices is None else len(devices)
    sizes = {"data": 1 if data is None else data, "tensor": tensor, "pipe": pipe}
    if min(sizes.values()) < 1:
        raise ValueError(
            "every axis of a mesh has size 1 or more, got "
            f"{', '.join(f'{name}({n})' for name, n in sizes.items())}."
        )
    if data is None:
        if have % (tensor * pipe):
            raise ValueError(
                f"tensor({tensor}) * pipe({pipe}) = {tensor * pipe} does not divide "
                f"the {have} devices. Choose sizes whose product divides {have}."
            )
        sizes["data"] = have // (tensor * pipe)
    elif (need := data * tensor * pipe) != have:
        raise ValueError(
            f"data({data}) * tensor({tensor}) * pipe({pipe}) = {need}, but there are "
            f"{have} devices. Choose sizes whose product is {have}, or leave out data."
        )
    # Spelled out: the default axis type depends on the JAX version. Auto: the user's
    # model says nothing about sharding, so the compiler has to carry it through.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices
    )
