from itertools import islice

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.data import batches, Dataset, steps_per_epoch


def numbered(n):
    """Image i is the pixel i, and its label is i."""
    images = np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1)
    return Dataset("numbers", images, np.arange(n), ("x",) * n, (0.0,), (1.0,))


@given(n=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 5))
def test_an_epoch_gives_each_example_at_most_once_and_keeps_its_label(n, size, seed):
    if size > n:
        return
    data = numbered(n)
    epoch = list(batches(data, size, seed=seed, steps=steps_per_epoch(data, size)))
    labels = np.concatenate([b.labels for b in epoch])
    assert len(set(labels.tolist())) == len(labels) == n - n % size
    for batch in epoch:
        assert batch.images.shape == (size, 1, 1, 1)
        assert np.array_equal(batch.images.ravel(), batch.labels)


@given(start=st.integers(0, 12), seed=st.integers(0, 3))
def test_a_run_resumes_at_any_step_of_any_epoch(start, seed):
    data = numbered(10)
    straight = [b.labels for b in batches(data, 3, seed=seed, steps=15)]
    rest = islice(batches(data, 3, seed=seed, start_step=start), 15 - start)
    assert np.array_equal(straight[start:], [b.labels for b in rest])


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    data = numbered(50)
    first, second = (b.labels for b in batches(data, 50, seed=0, steps=2))
    (other,) = (b.labels for b in batches(data, 50, seed=1, steps=1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_parts_of_the_processes_make_the_whole_batch():
    data = numbered(20)
    whole = [b.labels for b in batches(data, 6, steps=4)]
    parts = [
        [b.labels for b in batches(data, 6, steps=4, process_index=i, process_count=3)]
        for i in range(3)
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(ValueError, match="is 11 and numbers has 10 examples"):
        batches(numbered(10), 11)


@pytest.mark.parametrize("size", [0, 7])
def test_a_batch_that_does_not_divide_among_the_processes_is_an_error(size):
    with pytest.raises(ValueError, match=f"positive multiple of 2, got {size}"):
        batches(numbered(10), size, process_count=2, process_index=0)
