"""Which of several scores are the lowest."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.pruning.lowest import (
    drop_anywhere,
    drop_by_row,
    lowest,
    NM,
    parse_sparsity,
)


@given(
    scores=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    count=st.integers(0, 12),
)
def test_the_lowest_are_the_first_of_a_stable_sort(scores, count):
    score = np.asarray(scores, np.float32)
    want = np.zeros(score.shape, bool)
    want[np.argsort(score, kind="stable")[:count]] = True
    assert np.array_equal(lowest(jnp.asarray(score), count), want)


@pytest.mark.slow
@given(sparsity=st.floats(0, 0.999), rows=st.integers(1, 5), cols=st.integers(1, 9))
def test_shares_are_exact(sparsity, rows, cols):
    score = np.random.default_rng(rows * cols).normal(size=(2, rows, cols))
    score = jnp.asarray(score, jnp.float32)
    by_row, anywhere = drop_by_row(score, sparsity), drop_anywhere(score, sparsity)
    assert (np.asarray(by_row).sum(-1) == int(cols * sparsity)).all()
    assert np.asarray(anywhere).sum() == int(2 * rows * cols * sparsity)


@pytest.mark.parametrize("drop", [drop_by_row, drop_anywhere])
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 8), (4, 4)])
def test_n_of_each_m_stay(drop, n, m, normal):
    gone = np.asarray(drop(normal(2, 3, 16), NM(n, m)))
    assert (gone.reshape(2, 3, -1, m).sum(-1) == m - n).all()


def test_a_pattern_is_read_from_its_name():
    assert parse_sparsity("2:4") == NM(2, 4)
    assert parse_sparsity(0.5) == 0.5


@pytest.mark.parametrize("wrong", [1, -0.1, "2/4", "0:4", "5:4", "1:256"])
def test_no_sparsity_that_cannot_be_met(wrong):
    with pytest.raises(ValueError, match="got '?" + str(wrong)):
        parse_sparsity(wrong)
