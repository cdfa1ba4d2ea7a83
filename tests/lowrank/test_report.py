import jax
import numpy as np
import pytest

from jaxeff.lowrank import factorize, report


def fn(params, x):
    return x @ params["up"] @ params["down"] + params["bias"][None]


def test_ranks_sizes_and_errors_are_those_of_the_factors(normal):
    params = {"up": normal(16, 20), "down": normal(20, 3), "bias": normal(3)}
    x = normal(5, 16)
    r = report(fn, params, x, ranks={"**": 4})
    rows = {row.path: row for row in r.rows}
    _, low = factorize(fn, params, x, ranks={"**": 4})
    w = np.asarray(params["up"])
    error = np.linalg.norm(low["up"].dense() - w) / np.linalg.norm(w)
    assert rows["up"].error == pytest.approx(error, rel=1e-4)
    assert rows["up"].rank == 4
    assert rows["up"].density == pytest.approx(4 * (16 + 20) / (16 * 20))
    assert rows["down"].rank is rows["down"].error is None
    text = str(r)
    assert "has at most rank 3, and 4 is asked (1: down)" in text
    assert "no product, convolution or look-up uses it (1: bias)" in text
    assert "all weights" in text


def test_shapes_alone_give_sizes_without_errors(normal):
    params = {"up": normal(16, 20), "down": normal(20, 3), "bias": normal(3)}
    shapes = jax.eval_shape(lambda p: p, params)
    (row,) = (
        r for r in report(fn, shapes, normal(5, 16), ranks={"up": 4}).rows if r.rank
    )
    assert row.rank == 4 and row.error is None
