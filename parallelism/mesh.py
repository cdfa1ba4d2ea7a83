"""One mesh for every kind of parallelism; an axis of size 1 is switched off.

make_mesh()                       # all devices share the batch
make_mesh(fsdp=8, tensor=4)       # the rest of the devices is `data`
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

# From the axis that sends least and seldom to the one that sends most: the devices of
# the last axes are neighbours, and only the first reach over to other hosts and slices.
AXES = ("pipe", "data", "fsdp", "expert", "sequence", "tensor")
# Those that send seldom enough to reach over the network between slices.
OUTER_AXES = ("pipe", "data", "fsdp")
# Those whose devices hold different examples.
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    pipe: int = 1,
    sequence: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """All devices of all processes as a mesh with all six axes.

    The axes lie so that those that send most stay on the fastest links: `tensor` is
    innermost, `pipe` and `data` outermost. With several slices of TPUs, only the
    outermost axes cross the network between them.

    Args:
        data: copies of the model that share the batch; `None` takes all devices
            that the other axes leave.
        fsdp: devices that share the batch, and the weights and the state of the
            optimizer with it.
        tensor: devices that share each layer.
        pipe: devices that share the depth.
        sequence: devices that share the positions of each example.
        expert: devices that share the batch, and the experts of routed layers with it.
        devices: in place of `jax.devices()`.

    Raises:
        ValueError: the product of the sizes is not the number of devices, there are
            none, or slices do not divide into the outer axes.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < 1:
        raise ValueError(
            "a mesh has 1 device or more, got devices=[]. Leave devices out for all."
        )
    others = {
        "pipe": pipe,
        "fsdp": fsdp,
        "expert": expert,
        "sequence": sequence,
        "tensor": tensor,
    }
    sizes = _sizes(data, others, len(devices))
    shape = tuple(sizes[name] for name in AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    # Spelled out: the default axis type depends on the JAX version. Auto: the user's
    # model says nothing about sharding, so the compiler has to carry it through.
    types = (AxisType.Auto,) * len(AXES)
    # Where sizes need it two axes share one of the torus: tensor=8 on v6e:16x16.
    # `jax.make_mesh` refuses that.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        laid = mesh_utils.create_device_mesh(shape, devices, **split)
    else:
        across = split_over_slices(shape, slices)
        within = [n // s for n, s in zip(shape, across, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
    return Mesh(np.asarray(laid), AXES, axis_types=types)


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of TPUs that need not be there: programs compile for them.

        mesh = make_mesh(fsdp=256, devices=tpu_devices("v6e:16x16"))

    Nothing can run on them. What a compiled program would take and send can be read:
    `compiled.memory_analysis()`, `audit`.

    Args:
        topology: kind and shape, such as "v5p:2x2x4" or "v6e:16x16".

    Raises:
        ValueError: the TPU compiler is not installed, or does not know the topology.
    """
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    # JAX gives its own and the runtime's.
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"there is no TPU compiler here, or it does not know {topology!r}: {why}. "
            "It comes with pip install -e '.[tpu]', and topologies are written as in "
            "v5p:2x2x4."
        ) from None
    return list(found.devices)


def _sizes(data: int | None, others: dict[str, int], have: int) -> dict[str, int]:
    given = others if data is None else {"data": data, **others}
    # Only what was switched on: six axes make a long line.
    used = {n: s for n, s in given.items() if s != 1} or {"data": 1}
    spelled = " * ".join(f"{name}({n})" for name, n in used.items())
    if min(given.values()) < 1:
        raise ValueError(f"every axis of a mesh has size 1 or more, got {spelled}.")
    need = math.prod(given.values())
    if data is None:
        if have % need:
            raise ValueError(
                f"{spelled} = {need} does not divide the {have} devices. Choose sizes "
                f"whose product divides {have}."
            )
        return {"data": have // need, **others}
    if need != have:
        raise ValueError(
            f"{spelled} = {need}, but there are {have} devices. Choose sizes whose "
            f"product is {have}, or leave out data."
        )
    return given


def axis_size(mesh: Mesh, axis: str) -> int:
    """Devices along an axis of a mesh.

    Raises:
        ValueError: the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, and none "
            f"is called {axis}. Take one of make_mesh, which has all."
        )
    return mesh.shape[axis]


def split_over_slices(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """For each axis of a mesh, over how many slices it reaches: the outermost do.

    Raises:
        ValueError: the outer axes can't be split that way.
    """
    across, left = [], slices
    for name, size in zip(AXES, shape, strict=True):
        across.append(part := math.gcd(size, left) if name in OUTER_AXES else 1)
        left //= part
    if left > 1:
        sizes = " * ".join(
            f"{name}({n})" for name, n in zip(AXES, shape, strict=True) if n > 1
        )
        raise ValueError(
            f"over {slices} slices reach {', '.join(OUTER_AXES)}, but of "
            f"{sizes or 'data(1)'} they can't. Make data a multiple of {slices}."
        )
    return tuple(across)
