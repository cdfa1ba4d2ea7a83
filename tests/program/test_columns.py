"""A matrix changed column by column, against the same without blocks or factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program.columns import change_columns, inverse_factor


def problem(rows=12, cols=40, n=200, seed=0):
    """A weight, and inputs of which each resembles its neighbours."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, cols)).cumsum(1) / 3 + rng.normal(size=(n, cols))
    w = rng.normal(size=(rows, cols))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def test_the_factor_is_that_of_the_inverse():
    _, x = problem(cols=20)
    h = x.T @ x
    u = np.asarray(inverse_factor(h, 0.01), np.float64)
    damped = np.asarray(h) + 0.01 * np.diag(h).mean() * np.eye(20)
    assert np.abs(u.T @ u @ damped - np.eye(20)).max() < 1e-3
    assert np.array_equal(u, np.triu(u))
    assert np.allclose(inverse_factor(0 * h, 0.01), np.eye(20) / np.sqrt(1.01))


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_what_is_left_is_least_given_what_was_changed(block):
    """After each column the rest is the least-squares answer to the changed ones."""
    w, x = problem(rows=3, cols=20)
    h, damping = np.asarray(x.T @ x, np.float64), 0.01
    h = h + damping * np.diag(h).mean() * np.eye(20)
    last = 13  # columns up to here are rounded, the others only make up for them

    def change(k, at, part, factor, state):
        column = part[:, k]
        return jnp.where(at <= last, jnp.round(column), column), state + 1

    run = jax.jit(lambda w, h: change_columns(w, h, change, 0, block=block))
    got, columns = run(w, x.T @ x)
    assert columns == -(-20 // min(block, 20)) * min(block, 20)
    d = np.asarray(got, np.float64) - np.asarray(w)
    done, rest = np.arange(last + 1), np.arange(last + 1, 20)
    best = -np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, done)] @ d[:, done].T)
    np.testing.assert_allclose(d[:, rest], best.T, atol=2e-3)
    np.testing.assert_array_equal(got[:, : last + 1], np.round(got[:, : last + 1]))


def test_columns_that_stay_change_nothing():
    w, x = problem()
    keep = lambda k, at, part, factor, state: (part[:, k], state)
    np.testing.assert_array_equal(change_columns(w, x.T @ x, keep, ())[0], w)
