import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.lowrank import energy, factor_array


def singular_values(w, batch, rows):
    w = np.asarray(w, np.float64)
    shape, n = w.shape, batch + rows
    matrices = w.reshape(*shape[:batch], int(np.prod(shape[batch:n])), -1)
    return np.linalg.svd(matrices, compute_uv=False)


@pytest.mark.parametrize(
    "shape, rows, batch",
    [((8, 6), 1, 0), ((3, 3, 4, 10), 3, 0), ((5, 2, 4, 6), 2, 1), ((2, 3, 6, 8), 1, 2)],
)
def test_the_squared_error_is_the_sum_of_the_squares_left_out(
    shape, rows, batch, normal
):
    w = normal(*shape)
    s = singular_values(w, batch, rows)
    for rank in (1, 3):
        f = factor_array(w, rank, rows=rows, batch=batch)
        assert (f.shape, f.dtype, f.rank, f.cols) == (
            shape,
            w.dtype,
            rank,
            len(shape) - rows - batch,
        )
        error = float(jnp.sum((f.dense() - w) ** 2))
        left_out = (s[..., rank:] ** 2).sum()
        np.testing.assert_allclose(error, left_out, rtol=1e-4, atol=1e-9 * w.size)
        sizes = int(np.prod(shape[: batch + rows])), int(np.prod(shape[batch + rows :]))
        batches = int(np.prod(shape[:batch]))
        assert f.u.size + f.v.size == rank * (sizes[0] + batches * sizes[1])


def test_full_rank_is_dense_to_rounding(normal):
    w = normal(12, 20)
    f = factor_array(w, 1.0, rows=1)
    assert f.rank == 12
    np.testing.assert_allclose(f.dense(), w, atol=1e-5)


def test_the_factors_share_the_singular_values_evenly(normal):
    f = factor_array(normal(12, 20), 5, rows=1)
    of_u, of_v = jnp.linalg.norm(f.u, axis=0), jnp.linalg.norm(f.v, axis=1)
    np.testing.assert_allclose(of_u, of_v, rtol=1e-4)
    assert (jnp.diff(of_u) < 0).all()  # the largest first


def test_a_fraction_is_of_the_full_rank_and_at_least_one(normal):
    w = normal(3, 10, 6)
    assert factor_array(w, 0.5, rows=1, batch=1).rank == 3
    assert factor_array(w, 0.01, rows=1, batch=1).rank == 1
    assert factor_array(w, 1.0, rows=2).rank == 6


@given(fraction=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_energy_is_the_smallest_rank_that_keeps_it(fraction, seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(6, 9)), jnp.float32)
    f = factor_array(w, energy(fraction), rows=1)
    kept = np.cumsum(singular_values(w, 0, 1) ** 2) / np.sum(np.square(w))
    assert kept[f.rank - 1] >= fraction - 1e-6
    assert f.rank == 1 or kept[f.rank - 2] < fraction + 1e-6


def test_energy_of_a_stack_is_what_its_hungriest_layer_needs(normal):
    thin = jnp.outer(normal(8), normal(6))  # rank 1
    w = jnp.stack([thin, normal(8, 6)])
    each = [factor_array(x, energy(0.9), rows=1).rank for x in w]
    assert each[0] == 1 < each[1]
    assert factor_array(w, energy(0.9), rows=1, batch=1).rank == each[1]
    assert factor_array(jnp.zeros((4, 5)), energy(1.0), rows=1).rank == 1


@pytest.mark.parametrize(
    "rank, message",
    [
        (0, "whole number from 1 on, a fraction of the full rank in .0, 1., .* got 0"),
        (-2, "got -2"),
        (1.5, "got 1.5"),
        (0.0, "got 0.0"),
        (float("nan"), "got nan"),
        (True, "got True"),
        (7, "a 8 x 6 matrix has at most rank 6, got 7"),
    ],
)
def test_what_is_no_rank_is_refused(rank, message):
    with pytest.raises(ValueError, match=message):
        factor_array(jnp.ones((8, 6)), rank, rows=1)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_energy_is_a_fraction(fraction):
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\], got"):
        energy(fraction)


def test_shapes_are_enough_but_not_for_energy():
    w = jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    f = jax.eval_shape(lambda w: factor_array(w, 0.25, rows=1), w)
    assert (f.shape, f.dtype, f.rank) == ((64, 48), jnp.bfloat16, 12)
    with pytest.raises(ValueError, match="depends on the values"):
        jax.eval_shape(lambda w: factor_array(w, energy(0.9), rows=1), w)


@pytest.mark.parametrize("rows", [0, 2])
def test_both_factors_need_a_dim(rows):
    with pytest.raises(ValueError, match="at least one each"):
        factor_array(jnp.ones((2, 8, 6)), 2, rows=rows, batch=1)
