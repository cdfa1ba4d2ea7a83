"""SparseGPT on one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import equations
from jaxeff.pruning.lowest import drop_anywhere, NM
from jaxeff.pruning.sparsegpt import prune_matrix


def problem(rows=12, cols=40, n=200, seed=0):
    """A weight, and inputs of which each resembles its neighbours."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, cols)).cumsum(1) / 3 + rng.normal(size=(n, cols))
    w = rng.normal(size=(rows, cols))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def reference(w, h, sparsity, block, damping):
    """The paper's algorithm in float64, with exact counts."""
    w, h = np.asarray(w, np.float64).copy(), np.asarray(h, np.float64)
    rows, cols = w.shape
    h = h + damping * np.diag(h).mean() * np.eye(cols)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    total, done = int(rows * cols * sparsity) if isinstance(sparsity, float) else 0, 0
    for i in range(0, cols, block):
        end = min(i + block, cols)
        drop = np.zeros((rows, end - i), bool)
        if isinstance(sparsity, float):
            count, done = total * end // cols - done, total * end // cols
            score = (w[:, i:end] / np.diag(u)[i:end]) ** 2
            drop.flat[np.argsort(score, axis=None, kind="stable")[:count]] = True
        for j in range(i, end):
            if isinstance(sparsity, NM) and (j - i) % sparsity.m == 0:
                n, m = sparsity
                score = (w[:, j : j + m] / np.diag(u)[j : j + m]) ** 2
                order = np.argsort(score, axis=1, kind="stable")[:, : m - n]
                np.put_along_axis(drop[:, j - i : j - i + m], order, True, axis=1)
            error = np.where(drop[:, j - i], w[:, j], 0) / u[j, j]
            w[:, j:] -= error[:, None] * u[j, j:]
            w[drop[:, j - i], j] = 0
    return w


@pytest.mark.parametrize("sparsity", [0.5, 0.7, NM(2, 4), NM(1, 8)], ids=str)
@pytest.mark.parametrize("block", [8, 16, 128])
def test_it_agrees_with_the_paper_in_float64(sparsity, block):
    w, x = problem()
    h = x.T @ x
    got = np.asarray(prune_matrix(w, h, sparsity, block=block, damping=0.01))
    width = min(block, 40)
    want = reference(w, h, sparsity, width, 0.01)
    assert np.array_equal(got == 0, want == 0)
    assert np.abs(got - want).max() < 1e-3


def test_sparsity_0_changes_nothing():
    w, x = problem()
    assert np.array_equal(prune_matrix(w, x.T @ x, 0.0), w)
    assert np.array_equal(prune_matrix(w, x.T @ x, NM(4, 4)), w)


@pytest.mark.parametrize("rows, cols, block", [(3, 7, 4), (12, 40, 16), (5, 130, 128)])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_exactly_the_share_goes(rows, cols, block, sparsity):
    w, x = problem(rows, cols)
    got = prune_matrix(w, x.T @ x, sparsity, block=block)
    assert int((got == 0).sum()) == int(rows * cols * sparsity)


def test_without_correlation_it_is_magnitude():
    w, _ = problem()
    got = prune_matrix(w, 3 * jnp.eye(40), 0.5)
    assert np.array_equal(got, jnp.where(drop_anywhere(jnp.abs(w)[None], 0.5)[0], 0, w))


@pytest.mark.parametrize("sparsity", [0.5, NM(2, 4)], ids=str)
def test_the_error_is_less_than_that_of_its_mask_alone_and_of_magnitude(sparsity):
    ratios = []  # to each of the two, a problem at a time
    for seed in range(5):
        w, x = problem(seed=seed)
        got = prune_matrix(w, x.T @ x, sparsity)
        magnitude = jnp.where(drop_anywhere(jnp.abs(w)[None], sparsity)[0], 0, w)
        error, alone, simple = (
            float(jnp.linalg.norm(x @ (new - w).T))
            for new in (got, jnp.where(got == 0, 0, w), magnitude)
        )
        assert error < alone and error < simple
        ratios.append((error / alone, error / simple))
    assert (np.mean(ratios, axis=0) < 0.8).all()


def test_inputs_that_are_always_zero_go_first():
    w, x = problem()
    x = x.at[:, 5:15].set(0)
    got = np.asarray(prune_matrix(w, x.T @ x, 0.25))
    assert (got[:, 5:15] == 0).all() and np.isfinite(got).all()


@pytest.mark.parametrize("sparsity", [0.5, NM(2, 4)], ids=str)
def test_the_program_does_not_grow_with_the_matrix(sparsity):
    count = lambda jaxpr: sum(1 for _ in equations(jaxpr))

    def counted(cols):
        shapes = (jnp.zeros((8, cols)), jnp.zeros((cols, cols)))
        jaxpr = jax.make_jaxpr(lambda w, h: prune_matrix(w, h, sparsity))(*shapes)
        return count(jaxpr)

    assert counted(256) == counted(1024) > 20
