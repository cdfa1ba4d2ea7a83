import dataclasses

import pytest
from hypothesis import given, strategies as st

from jaxeff.quantization import int4, int8, Linear, w8a8


def test_the_usual_formats():
    assert (int8, int4) == (Linear(8), Linear(4))
    assert w8a8 == Linear(8, activations=8)
    assert int4.grouped(32) == Linear(4, group=32)
    assert [f.name for f in (int8, int4, w8a8)] == ["int8", "int4", "w8a8"]
    assert int4.grouped(32).name == "int4 groups of 32"
    assert Linear(4, activations=8).name == "w4a8"
    assert len({int8, int4, w8a8, Linear(8)}) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 3}, "4 or 8 bits, got bits=3"),
        ({"bits": 16}, "4 or 8 bits, got bits=16"),
        ({"bits": 4, "group": 0}, "at least 1 weight, got group=0"),
        ({"bits": 8, "activations": 4}, "8 or None"),
    ],
)
def test_what_cannot_be_stored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Linear(**options)


def test_formats_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        int8.bits = 4


@pytest.mark.parametrize(
    "group, shape, contract, blocks",
    [
        (None, (3, 3, 16, 8), (0, 1, 2), (3, 3, 16, 1)),
        (4, (16, 8), (0,), (4, 1)),
        (4, (8, 16), (1,), (1, 4)),
        (16, (3, 3, 16, 8), (0, 1, 2), (1, 1, 16, 1)),
        (32, (4, 8, 16, 5), (0, 1, 2), (1, 2, 16, 1)),
        (8, (4, 8, 16, 5), (0, 1, 2), (1, 1, 8, 1)),
        (1, (4, 5), (0,), (1, 1)),
    ],
)
def test_a_group_is_a_run_of_the_contracted_weights(group, shape, contract, blocks):
    assert Linear(8, group=group).blocks(shape, contract) == blocks


@given(n=st.integers(1, 40), group=st.integers(1, 40))
def test_a_group_either_divides_or_is_refused_with_those_that_do(n, group):
    fmt = int4.grouped(group)
    if n % group == 0:
        assert fmt.blocks((n, 7), (0,)) == (group, 1)
    else:
        with pytest.raises(ValueError, match=f"group of {group} weights") as e:
            fmt.blocks((n, 7), (0,))
        assert str([d for d in range(1, n + 1) if n % d == 0]) in str(e.value)
