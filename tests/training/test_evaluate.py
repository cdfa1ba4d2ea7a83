import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff.data import digits
from jaxeff.training import accuracy
from jaxeff.training.evaluate import one_behind


def read_off(params, images):
    """Logits that name the label written into the first pixel."""
    return jax.nn.one_hot(jnp.round(images[:, 0, 0, 0]).astype(int) + params, 10)


@pytest.fixture(scope="module")
def marked():
    """Ten images marked with their label, three of them wrongly."""
    _, test = digits()
    images = np.array(test.images[:11])
    labels = np.arange(11, dtype=np.int32) % 10
    images[:, 0, 0, 0] = np.where(np.arange(11) < 3, 9 - labels, labels)
    return dataclasses.replace(test, images=images, labels=labels)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 11, 12, 500])
def test_the_count_is_exact_for_every_batch_size(marked, batch_size):
    assert accuracy(read_off, 0, marked, batch_size) == 8 / 11


def test_a_sharding_changes_nothing(marked):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    to = NamedSharding(mesh, P("data"))
    assert accuracy(read_off, 0, marked, 8, to=to) == 8 / 11


def test_a_second_evaluation_compiles_nothing(marked):
    traces = []

    def fn(params, images):
        traces.append(1)
        return read_off(params, images)

    accuracy(fn, 0, marked, 4)
    accuracy(fn, 1, marked, 4)
    assert len(traces) == 1


def test_an_empty_batch_is_an_error(marked):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        accuracy(read_off, 0, marked, 0)


def test_one_result_is_computed_while_the_one_before_is_read():
    asked = []
    numbers = (asked.append(n) or jnp.float32(n) for n in range(5))
    for n, read in enumerate(one_behind(numbers)):
        assert read == n
        assert len(asked) == min(n + 2, 5)
    assert list(one_behind(())) == []
