import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.quantization import floating, Linear, Logarithmic
from jaxeff.quantization.grids import named, neighbours

GRIDS = [
    *(Linear(b) for b in range(2, 9)),
    Linear(4, narrow=False),
    *(Linear(b, symmetric=False) for b in (2, 4, 8)),
    *(Logarithmic(b) for b in (2, 3, 4, 7)),
    Logarithmic(4, per_octave=2),
    Logarithmic(6, per_octave=3),
    *map(floating, ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4"]),
]
by_name = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)


@by_name
def test_its_name_makes_it_again(grid):
    assert named(grid.name) == grid


def test_an_unknown_name_is_one_clear_line():
    with pytest.raises(ValueError, match="no number format 'int1': int2 to int8"):
        named("int1")


@by_name
def test_every_number_has_a_code_of_so_many_bits_and_survives(grid):
    levels = np.asarray(grid.levels, np.float32)
    assert len(levels) == len(set(levels)) <= 2**grid.bits

    @jax.jit
    def run(x):
        codes = grid.encode(x)
        return grid.decode(codes), grid.from_bytes(grid.to_bytes(codes)), codes

    decoded, again, codes = run(levels)
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), levels)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(codes))
    if grid.bits < 8:
        assert grid.to_bytes(codes).dtype == jnp.uint8
        assert int(grid.to_bytes(codes).max()) < 2**grid.bits


@by_name
def test_no_number_is_nearer_than_the_one_taken(grid):
    levels = np.asarray(grid.levels, np.float64)
    top = abs(levels).max()
    x = np.random.default_rng(0).normal(size=2000) * top / 2
    x = np.concatenate([x, x * 1e-3, [0, 3 * top, -3 * top]]).astype(np.float32)
    nearest = np.abs(x[:, None] - levels).min(1)
    off = np.abs(np.asarray(jax.jit(grid.nearest)(x), np.float64) - x)
    np.testing.assert_allclose(off, nearest, rtol=1e-5, atol=1e-7 * top)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("e4m3", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
    ],
)
def test_floats_are_rounded_as_their_dtype_is_ties_included(kind, dtype):
    grid = floating(kind)
    levels = np.asarray(grid.levels, np.float32)
    ties = (levels[1:] + levels[:-1]) / 2
    x = np.concatenate([levels, ties, np.linspace(levels[0], levels[-1], 999)])
    expected = x.astype(np.float32).astype(dtype).astype(np.float32)
    ours = jax.jit(grid.nearest)(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(ours, expected)


@given(st.floats(2**-6, 1.0), st.sampled_from([1, 2, 3]))
def test_a_power_is_off_by_no_more_than_its_base_allows(x, per_octave):
    grid = Logarithmic(7, per_octave=per_octave)
    near = np.asarray(grid.levels)[np.abs(np.asarray(grid.levels) - x).argmin()]
    base = 2 ** (1 / per_octave)
    assert abs(near - x) <= (1 + 1e-6) * (base - 1) / (base + 1) * x


def test_powers_of_two_are_decoded_by_bits_alone():
    grid = Logarithmic(5)
    jaxpr = jax.make_jaxpr(grid.decode)(jnp.zeros(3, jnp.uint8))
    names = {e.primitive.name for e in jaxpr.eqns}
    assert not names & {"gather", "mul", "exp2", "pow"}


def test_the_normal_float_is_the_table_of_the_paper():
    levels = floating("nf4").levels
    # Appendix E: the quantiles at equal steps between these, scaled to end at 1.
    assert len(levels) == 16 and 0.0 in levels and (levels[0], levels[-1]) == (-1, 1)
    from statistics import NormalDist

    offset = 0.5 * (1 / 32 + 1 / 30)
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(1 - offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(1 - offset, 0.5, 8)[:-1]]
    made = sorted([*positive, 0.0, *negative])
    np.testing.assert_allclose(levels, np.asarray(made) / max(made), atol=2e-4)


@by_name
def test_neighbours_are_next_to_each_other_with_the_number_between(grid):
    levels = np.asarray(grid.levels, np.float32)
    x = jnp.asarray(np.random.default_rng(0).uniform(levels[0], levels[-1], 500))
    low, high = jax.jit(lambda x: neighbours(x, grid))(x)
    assert np.all(low <= x) and np.all(x <= high)
    np.testing.assert_array_equal(
        np.searchsorted(levels, high), np.searchsorted(levels, low) + 1
    )
