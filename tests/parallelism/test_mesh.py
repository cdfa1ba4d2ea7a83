import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxeff.parallelism import make_mesh, tpu_devices
from jaxeff.parallelism.mesh import AXES, split_over_slices


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, {"data": 8}),
        ({"tensor": 2}, {"data": 4, "tensor": 2}),
        ({"tensor": 2, "pipe": 4}, {"tensor": 2, "pipe": 4}),
        ({"data": 2, "tensor": 2, "pipe": 2}, {"data": 2, "tensor": 2, "pipe": 2}),
        ({"fsdp": 2, "expert": 2}, {"data": 2, "fsdp": 2, "expert": 2}),
        ({"sequence": 8}, {"sequence": 8}),
    ],
)
def test_the_axes_take_all_devices_once(sizes, shape):
    mesh = make_mesh(**sizes)
    assert {name: n for name, n in mesh.shape.items() if n > 1} == shape
    assert mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(jax.devices())


def test_every_axis_is_auto_in_every_version():
    assert make_mesh().axis_types == (AxisType.Auto,) * 6


def test_a_mesh_of_some_devices_has_only_those():
    some = jax.devices()[2:6]
    mesh = make_mesh(tensor=2, devices=some)
    assert mesh.shape["data"] == 2 and set(mesh.devices.flat) == set(some)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, r"data\(3\) = 3, but there are 8"),
        ({"tensor": 3}, r"tensor\(3\) = 3 does not divide the 8 devices"),
        ({"data": 0}, r"size 1 or more, got data\(0\)"),
        ({"tensor": -2}, r"tensor\(-2\)"),
        ({"fsdp": 2, "pipe": 3}, r"pipe\(3\) \* fsdp\(2\) = 6 does not divide"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_an_error(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_mesh(**sizes)


def test_a_mesh_of_no_device_is_an_error():
    with pytest.raises(ValueError, match="1 device or more, got devices="):
        make_mesh(devices=[])


def test_devices_of_the_axis_that_sends_most_are_neighbours():
    mesh = make_mesh(tensor=2, pipe=2)
    ids = [d.id for d in mesh.devices.reshape(2, 2, 2)[0, 0]]
    assert abs(ids[0] - ids[1]) == 1


@pytest.mark.parametrize(
    ("shape", "slices", "across"),
    [
        ((1, 8, 1, 1, 1, 4), 2, (1, 2, 1, 1, 1, 1)),
        ((2, 4, 2, 1, 1, 4), 4, (2, 2, 1, 1, 1, 1)),
        ((1, 1, 16, 1, 1, 4), 4, (1, 1, 4, 1, 1, 1)),
    ],
)
def test_only_the_outermost_axes_reach_over_slices(shape, slices, across):
    assert split_over_slices(shape, slices) == across


@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1, 3), (1, 1, 1, 1, 1, 8)])
def test_axes_that_do_not_divide_by_the_slices_are_an_error(shape):
    with pytest.raises(ValueError, match=r"over 2 slices .* tensor\(\d\) they can't"):
        split_over_slices(shape, 2)


def test_chips_that_are_not_there_make_a_mesh(tpus):
    mesh = make_mesh(fsdp=4, tensor=2, devices=tpus("v5e:2x4"))
    assert mesh.size == 8 and {d.platform for d in mesh.devices.flat} == {"tpu"}


def test_axes_may_share_one_of_the_torus(tpus):
    mesh = make_mesh(fsdp=32, tensor=8, devices=tpus("v6e:16x16"))
    assert len(set(mesh.devices.flat)) == 256
    for group in mesh.devices.reshape(32, 8):
        # Eight neighbours: in a box of eight chips.
        coords = np.array([d.coords for d in group])
        assert np.prod(np.ptp(coords, axis=0) + 1) == 8


def test_a_topology_that_no_compiler_here_knows_is_an_error():
    # With libtpu for its shape, without for want of it.
    with pytest.raises(ValueError, match="or it does not know 'v5e:3x7'"):
        tpu_devices("v5e:3x7")
