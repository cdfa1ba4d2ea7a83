"""GPTQ with codebooks on one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import equations
from jaxeff.quantization import Codebook, int4, scales
from jaxeff.quantization.gptq import gptq_matrix
from jaxeff.quantization.gptq_codes import gptq_codes
from jaxeff.quantization.learn import learn
from tests.quantization.problems import output_error, problem

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_it_is_what_its_codes_pick_and_the_error_is_less[128-codebook5x2]",
    "test_it_is_what_its_codes_pick_and_the_error_is_less[128-codebook3]",
    "test_it_is_what_its_codes_pick_and_the_error_is_less[6-codebook4x4 in 2 stages]",
    "test_it_is_what_its_codes_pick_and_the_error_is_less[6-codebook5x2]",
    "test_it_is_what_its_codes_pick_and_the_error_is_less[6-codebook3]",
    "test_it_is_what_its_codes_pick_and_the_error_is_less[128-codebook4x4 in 2 stages]",
}

FORMATS = [
    Codebook(4),
    Codebook(5, dim=2),
    Codebook(4, dim=4, stages=2),
    Codebook(3, outputs=4),
]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def learned(w, fmt):
    """The codebooks of a matrix, which of them each row takes, and row scales."""
    q = learn(w, fmt, (1,))
    books = q.books.reshape(-1, *q.books.shape[2:])
    book = jnp.arange(len(w)) * len(books) // len(w)
    return q, (books, book, q.scale[:, 0])


def decoded(codes, books, book, scale):
    out = np.zeros((*codes.shape[:2], books.shape[-1]))
    for row, vector in np.ndindex(*codes.shape[:2]):
        for stage, code in enumerate(codes[row, vector]):
            out[row, vector] += books[book[row], stage, code]
    return out.reshape(len(codes), -1) * np.asarray(scale)[:, None]


@by_name
@pytest.mark.parametrize("block", [6, 128])
def test_it_is_what_its_codes_pick_and_the_error_is_less(fmt, block):
    ratios = []
    for seed in range(3):
        w, x = problem(seed=seed)
        q, given = learned(w, fmt)
        got, codes = gptq_codes(w, x.T @ x, *given, block=block)
        want = decoded(np.asarray(codes), *map(np.asarray, given))
        np.testing.assert_allclose(got, want, atol=1e-5)
        ratios.append(output_error(x, got, w) / output_error(x, q.dense(), w))
    assert max(ratios) < 1 and np.mean(ratios) < 0.8


@by_name
@pytest.mark.parametrize("activation_order", [False, True])
def test_without_correlation_each_code_picks_the_nearest(fmt, activation_order):
    w, _ = problem()
    q, given = learned(w, fmt)
    got, codes = gptq_codes(
        w, 3 * jnp.eye(40), *given, activation_order=activation_order
    )
    if fmt.stages == 1:
        np.testing.assert_array_equal(codes, q.plain())
        np.testing.assert_allclose(got, q.dense(), atol=1e-5)
    # Sums of several stages may be others, nearly as near.
    off = lambda w_new: float(jnp.linalg.norm(w_new - w))
    assert off(got) < 1.1 * off(q.dense())


def test_a_codebook_of_integers_is_the_format_of_integers():
    w, x = problem()
    found = scales.fit(w, int4, (1, 40))
    scale = scales.real(found)
    books = jnp.arange(-7.0, 8).reshape(1, 1, 15, 1)
    rows = jnp.zeros(12, jnp.int32)
    got, codes = gptq_codes(w, x.T @ x, books, rows, scale[:, 0])
    spread = jnp.broadcast_to(scale, w.shape)
    want = gptq_matrix(w, x.T @ x, spread, None, grid=int4.grid)
    # A tie may fall either way.
    assert np.mean(np.abs(got - want) > 1e-4) < 0.02
    assert codes.shape == (12, 40, 1)


def test_the_first_vector_takes_the_code_that_costs_least():
    """The loss of each code, when all columns to its right make up for it freely."""
    w, x = problem()
    _, (books, book, scale) = learned(w, Codebook(4, dim=4))
    _, codes = gptq_codes(w, x.T @ x, books, book, scale, activation_order=False)
    h = np.asarray(x.T @ x, np.float64)
    h += 0.01 * np.diag(h).mean() * np.eye(40)
    first, rest = slice(0, 4), slice(4, 40)
    cost = h[first, first] - h[first, rest] @ np.linalg.solve(
        h[rest, rest], h[rest, first]
    )
    d = np.asarray(w)[:, None, first] - np.asarray(
        scale[:, None, None] * books[0, 0][None]
    )
    loss = np.einsum("rki,ij,rkj->rk", d, cost, d)
    chosen = loss[np.arange(12), codes[:, 0, 0]]
    np.testing.assert_allclose(chosen, loss.min(1), rtol=1e-3)
    plain = np.argmin((d**2).sum(-1), 1)
    assert (plain != np.asarray(codes[:, 0, 0])).any()


def test_the_program_does_not_grow_with_the_matrix():
    def counted(cols):
        books = jnp.zeros((1, 2, 16, 4))
        run = lambda w, h: gptq_codes(w, h, books, jnp.zeros(8, int), jnp.ones(8))
        jaxpr = jax.make_jaxpr(run)(jnp.zeros((8, cols)), jnp.zeros((cols, cols)))
        return sum(1 for _ in equations(jaxpr))

    assert counted(256) == counted(1024) > 20
