"""AdaRound on one matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization import int4, log4_sqrt2, scales, uint4
from jaxeff.quantization.adaround import adaround_matrix
from jaxeff.quantization.grids import neighbours
from tests.quantization.problems import output_error, problem
from tests.quantization.test_gptq import under


@pytest.mark.parametrize("fmt", [int4, uint4, log4_sqrt2], ids=str)
def test_each_weight_goes_up_or_down_and_the_error_is_less(fmt):
    ratios = []
    for seed in range(3):
        w, x = problem(seed=seed)
        found, scale, zero = under(w, fmt)
        got = adaround_matrix(w, x.T @ x, scale, zero, grid=fmt.grid, steps=800)
        shift = 0 if zero is None else zero
        low, high = (
            scale * (n - shift) for n in neighbours(w / scale + shift, fmt.grid)
        )
        off = np.minimum(np.abs(got - low), np.abs(got - high))
        assert off.max() < 1e-6
        nearest = scales.apply(w, found, fmt.grid)
        ratios.append(output_error(x, got, w) / output_error(x, nearest, w))
    assert max(ratios) < 1 and np.mean(ratios) < 0.75


def test_it_is_never_worse_than_the_nearest_row_by_row():
    w, x = problem()
    found, scale, _ = under(w, int4)
    # So few steps, so large, learn nothing.
    got = adaround_matrix(
        w, x.T @ x, scale, None, grid=int4.grid, steps=2, learning_rate=5.0
    )
    nearest = scales.apply(w, found, int4.grid)
    error = lambda new: jnp.linalg.norm(x @ (new - w).T, axis=0)
    assert np.all(error(got) <= error(nearest) * (1 + 1e-5))


def test_inputs_that_are_always_zero_leave_the_nearest():
    w, _ = problem()
    found, scale, _ = under(w, int4)
    got = adaround_matrix(w, jnp.zeros((40, 40)), scale, None, grid=int4.grid, steps=5)
    np.testing.assert_allclose(got, scales.apply(w, found, int4.grid), atol=1e-6)
