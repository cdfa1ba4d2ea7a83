import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.parallelism import balance

weights = st.lists(st.integers(0, 50), min_size=1, max_size=9)


def sizes(n, parts):
    """Every way to share n items out among parts."""
    for ends in itertools.combinations(range(1, n), parts - 1):
        yield tuple(np.diff([0, *ends, n]).tolist())


def heaviest(costs, cut):
    ends = np.cumsum([0, *cut])
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))


def sent(sends, cut):
    return sum(sends[e - 1] for e in np.cumsum(cut)[:-1])


@given(weights, st.integers(1, 5))
def test_no_other_cut_has_a_lighter_heaviest_part(costs, parts):
    parts = min(parts, len(costs))
    cut = balance(costs, parts)
    assert sum(cut) == len(costs) and min(cut) >= 1 and len(cut) == parts
    best = min(heaviest(costs, c) for c in sizes(len(costs), parts))
    assert heaviest(costs, cut) == best


@given(weights, st.integers(1, 5), st.data())
def test_within_the_slack_no_other_cut_sends_less(costs, parts, data):
    n = len(costs)
    sends = data.draw(st.lists(st.integers(0, 9), min_size=n - 1, max_size=n - 1))
    parts = min(parts, n)
    cut = balance(costs, parts, sends, slack=0.25)
    limit = 1.25 * min(heaviest(costs, c) for c in sizes(n, parts))
    assert heaviest(costs, cut) <= limit + 1e-6
    allowed = [c for c in sizes(n, parts) if heaviest(costs, c) <= limit]
    assert sent(sends, cut) == min(sent(sends, c) for c in allowed)


def test_equal_items_are_shared_out_evenly():
    assert sorted(balance([1.0] * 10, 4)) == [2, 2, 3, 3]


def test_there_are_as_many_items_as_parts():
    with pytest.raises(ValueError, match="2 items can't be shared out among 3 parts"):
        balance([1.0, 2.0], 3)
