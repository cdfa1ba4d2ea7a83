"""GPTQ on one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import equations
from jaxeff.quantization import int3, int4, log4_sqrt2, nf4, scales, uint4
from jaxeff.quantization.gptq import gptq_groups, gptq_matrix
from tests.quantization.problems import output_error, problem


def under(w, fmt, shared=None):
    """Scale and zero of each entry."""
    found = scales.fit(w, fmt, shared or (1, w.shape[1]))
    spread = lambda x: jnp.repeat(x, w.shape[1] // x.shape[1], 1)
    zero = None if found.zero is None else spread(found.zero).astype(jnp.float32)
    return found, spread(scales.real(found)), zero


def reference(w, h, scale, order, damping):
    """The paper's algorithm in float64, one column at a time."""
    w, h = np.asarray(w, np.float64)[:, order], np.asarray(h, np.float64)
    h = h[np.ix_(order, order)] + damping * np.diag(h).mean() * np.eye(len(order))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    scale, new = np.asarray(scale, np.float64)[:, order], np.zeros(w.shape)
    for j in range(w.shape[1]):
        new[:, j] = np.clip(np.round(w[:, j] / scale[:, j]), -7, 7) * scale[:, j]
        w[:, j:] -= np.outer((w[:, j] - new[:, j]) / u[j, j], u[j, j:])
    return new[:, np.argsort(order)]


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("block", [8, 24, 128])
def test_it_agrees_with_the_paper_in_float64(activation_order, block):
    w, x = problem()
    h = x.T @ x
    _, scale, _ = under(w, int4)
    order = (
        np.argsort(-np.diag(h), kind="stable") if activation_order else np.arange(40)
    )
    got = gptq_matrix(
        w, h, scale, None,
        grid=int4.grid, activation_order=activation_order, block=block,
    )  # fmt: skip
    want = reference(w, h, scale, order, 0.01)
    # A tie may fall either way in float32, and what follows makes up for it.
    assert np.mean(np.abs(got - want) > 1e-3 * np.abs(w).max()) < 0.02
    assert abs(output_error(x, got, w) / output_error(x, want, w) - 1) < 0.02


@pytest.mark.parametrize("fmt", [int4, uint4, log4_sqrt2, nf4.grouped(None)], ids=str)
def test_every_entry_is_on_the_grid_and_the_error_is_less(fmt):
    ratios = []
    for seed in range(3):
        w, x = problem(seed=seed)
        found, scale, zero = under(w, fmt)
        got = gptq_matrix(w, x.T @ x, scale, zero, grid=fmt.grid)
        nearest = scales.apply(w, found, fmt.grid)
        np.testing.assert_allclose(scales.apply(got, found, fmt.grid), got, atol=1e-6)
        ratios.append(output_error(x, got, w) / output_error(x, nearest, w))
    assert max(ratios) < 1 and np.mean(ratios) < 0.75


def test_without_correlation_it_is_the_nearest():
    w, _ = problem()
    found, scale, _ = under(w, int4)
    got = gptq_matrix(w, 3 * jnp.eye(40), scale, None, grid=int4.grid)
    np.testing.assert_array_equal(got, scales.apply(w, found, int4.grid))


@pytest.mark.parametrize("fmt", [int4.grouped(8), uint4.grouped(10)], ids=str)
@pytest.mark.parametrize("block", [16, 128])
def test_groups_are_scaled_when_they_are_reached(fmt, block):
    w, x = problem()
    got, found = jax.jit(lambda w, h: gptq_groups(w, h, format=fmt, block=block))(
        w, x.T @ x
    )
    assert found.scale.shape == (12, 40 // fmt.group)
    np.testing.assert_allclose(scales.apply(got, found, fmt.grid), got, atol=1e-5)
    # The first group is scaled before anything was rounded, the others are not.
    before = scales.fit(w, fmt, (1, fmt.group))
    np.testing.assert_allclose(found.scale[:, 0], before.scale[:, 0], rtol=1e-6)
    assert not np.allclose(found.scale[:, 1:], before.scale[:, 1:], rtol=1e-3)
    nearest = scales.apply(w, before, fmt.grid)
    assert output_error(x, got, w) < 0.8 * output_error(x, nearest, w)


def test_groups_that_are_scaled_on_the_way_count_each_input_by_its_square():
    w, _ = problem()
    # Inputs that know nothing of each other: no error is made up for.
    for squares in (jnp.ones(40), 10.0 ** (jnp.arange(40) % 5)):
        group = lambda w, h: gptq_groups(w, h, format=int3.grouped(8), method="mse")
        found = jax.jit(group)(w, jnp.diag(squares))[1]
        by = {"method": "mse", "importance": squares[None]}
        want = scales.fit(w, int3.grouped(8), (1, 8), **by)
        np.testing.assert_allclose(found.scale, want.scale, rtol=1e-5)


def test_inputs_that_are_always_zero_are_no_trouble():
    w, x = problem()
    x = x.at[:, 5:15].set(0)
    _, scale, _ = under(w, int3)
    got = gptq_matrix(w, x.T @ x, scale, None, grid=int3.grid)
    assert np.isfinite(got).all()


def test_the_program_does_not_grow_with_the_matrix():
    count = lambda jaxpr: sum(1 for _ in equations(jaxpr))

    def counted(cols):
        w, h = jnp.zeros((8, cols)), jnp.zeros((cols, cols))
        static = lambda w, h: gptq_matrix(w, h, w, None, grid=int4.grid)
        dynamic = lambda w, h: gptq_groups(w, h, format=int4.grouped(64))
        return [count(jax.make_jaxpr(f)(w, h)) for f in (static, dynamic)]

    assert counted(256) == counted(1024) and min(counted(256)) > 20
