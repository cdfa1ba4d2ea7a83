import dataclasses

import pytest
from hypothesis import given, strategies as st

from jaxeff.quantization import (
    floating,
    Format,
    int4,
    int8,
    Linear,
    Logarithmic,
    mxfp4,
    nf4,
    nvfp4,
    uint4,
    w4a8,
    w8a8,
)


def test_the_usual_formats():
    assert (int8, int4) == (Format(Linear(8)), Format(Linear(4)))
    assert w8a8 == Format(Linear(8), activations="int8")
    assert int4.grouped(32) == Format(Linear(4), group=32)
    assert nvfp4 == Format(floating("e2m1"), group=16, scale="e4m3")
    assert len({int8, int4, w8a8, Format(Linear(8))}) == 3


NAMES = {
    "int8": int8,
    "w8a8": w8a8,
    "w4a8": w4a8,
    "uint4 x int8": uint4.with_activations("int8"),
    "w4a8 static (mse)": int4.with_activations("int8", range="mse"),
    "log3 x e4m3": Format(Logarithmic(3)).with_activations("e4m3"),
    "int4 groups of 32": int4.grouped(32),
    "int4 tiles of 32 x 8": int4.tiled(32, 8),
    "int4 tiles of all x 8": dataclasses.replace(int4, outputs=8),
    "int4 per tensor": int4.per_tensor(),
    "int4 rows of 8": dataclasses.replace(int4, group=8, outputs=None),
    "mxfp4": mxfp4,
    "e2m1 groups of 64, e8m0 scales": mxfp4.grouped(64),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_all_that_differs(name):
    assert NAMES[name].name == name


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(1), "2 to 8 bits, got 1"),
        (lambda: Linear(16), "2 to 8 bits, got 16"),
        (lambda: Logarithmic(9), "2 to 8 bits"),
        (lambda: Logarithmic(4, per_octave=0), "1 step or more"),
        (lambda: Logarithmic(8), "below the smallest float32"),
        (lambda: floating("e9m9"), "no format 'e9m9'. Choose of: e4m3"),
        (lambda: int4.grouped(0), "at least 1 weight, got 0"),
        (lambda: int4.tiled(4, 0), "block of outputs holds at least 1 weight, got 0"),
        (lambda: Format(Linear(4), scale="int8"), "float32, e8m0, e4m3, none"),
        (lambda: dataclasses.replace(uint4, scale="e8m0"), "Choose a symmetric format"),
        (lambda: int4.with_activations("int9"), "no number format 'int9'"),
        (lambda: int4.with_activations("uint8"), "rounded to int2 ... int8"),
        (lambda: int4.with_activations("log4"), "rounded to int2 ... int8"),
        (lambda: dataclasses.replace(int4, range="mse"), "name what they are rounded"),
        (lambda: int4.with_activations("int8", range="median"), "one of minmax"),
    ],
)
def test_what_cannot_be_stored_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group": "32"}, "at least 1 weight, got '32'"),
        ({"group": 4.0}, "at least 1 weight, got 4.0"),
        ({"grid": "int4"}, "made of a grid, .* got 'int4'. Formats with a name"),
        ({"activations": int4}, 'given by its name, "int8" or'),
        ({"activations": "int8", "range": True}, "one of minmax"),
    ],
)
def test_what_is_of_another_type_is_one_clear_line(fields, message):
    # Set by hand, for these tests check the types of every call.
    fmt = object.__new__(Format)
    vars(fmt).update(vars(int4) | fields)
    with pytest.raises(ValueError, match=message) as e:
        fmt.__post_init__()
    assert "\n" not in str(e.value)


def test_formats_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        int8.group = 4


@pytest.mark.parametrize(
    "fmt, shape, contract, batch, blocks",
    [
        (int8, (3, 3, 16, 8), (0, 1, 2), (), (3, 3, 16, 1)),
        (int8.grouped(4), (16, 8), (0,), (), (4, 1)),
        (int8.grouped(4), (8, 16), (1,), (), (1, 4)),
        (int8.grouped(16), (3, 3, 16, 8), (0, 1, 2), (), (1, 1, 16, 1)),
        (int8.grouped(32), (4, 8, 16, 5), (0, 1, 2), (), (1, 2, 16, 1)),
        (int8.grouped(8), (4, 8, 16, 5), (0, 1, 2), (), (1, 1, 8, 1)),
        (int8.grouped(1), (4, 5), (0,), (), (1, 1)),
        (int8.tiled(4, 2), (16, 8), (0,), (), (4, 2)),
        (int8.tiled(4, 6), (16, 2, 3), (0,), (), (4, 2, 3)),
        (int8.per_tensor(), (5, 16, 8), (1,), (), (5, 16, 8)),
        (int8.per_tensor(), (5, 16, 8), (1,), (0,), (1, 16, 8)),
        (nf4, (128, 8), (0,), (), (64, 1)),
    ],
)
def test_a_block_is_a_run_of_what_is_summed_and_of_outputs(
    fmt, shape, contract, batch, blocks
):
    assert fmt.blocks(shape, contract, batch) == blocks


@given(n=st.integers(1, 40), group=st.integers(1, 40))
def test_a_group_either_divides_or_is_refused_with_those_that_do(n, group):
    fmt = int4.grouped(group)
    if n % group == 0:
        assert fmt.blocks((n, 7), (0,)) == (group, 1)
    else:
        with pytest.raises(ValueError, match=f"group of {group} weights") as e:
            fmt.blocks((n, 7), (0,))
        assert str([d for d in range(2, n + 1) if n % d == 0]) in str(e.value) or n == 1
