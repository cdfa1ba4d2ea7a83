import jax
import pytest
from jax.sharding import AxisType

from jaxeff.parallelism import make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"tensor": 2}, (4, 2, 1)),
        ({"tensor": 2, "pipe": 4}, (1, 2, 4)),
        ({"data": 2, "tensor": 2, "pipe": 2}, (2, 2, 2)),
    ],
)
def test_the_axes_take_all_devices_once(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(mesh.axis_names, shape, strict=True))
    assert mesh.axis_names == ("data", "tensor", "pipe")
    assert set(mesh.devices.flat) == set(jax.devices())


def test_every_axis_is_auto_in_every_version():
    assert make_mesh().axis_types == (AxisType.Auto,) * 3


def test_a_mesh_of_some_devices_has_only_those():
    some = jax.devices()[2:6]
    mesh = make_mesh(tensor=2, devices=some)
    assert mesh.shape["data"] == 2 and set(mesh.devices.flat) == set(some)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, r"data\(3\) \* tensor\(1\) \* pipe\(1\) = 3, but there are 8"),
        ({"tensor": 3}, r"tensor\(3\) \* pipe\(1\) = 3 does not divide the 8 devices"),
        ({"data": 0}, r"size 1 or more, got data\(0\)"),
        ({"tensor": -2}, r"tensor\(-2\)"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_an_error(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_mesh(**sizes)
