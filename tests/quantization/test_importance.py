"""Scales and codebooks fitted to outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization import Codebook, int3, quantize
from jaxeff.quantization.choice import Choice
from jaxeff.quantization.importance import importances

RNG = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)
PARAMS = {"w": draw(3, 40, 24)}
SIZES = jnp.exp(jnp.linspace(-2, 2, 40))
X = draw(300, 40) * SIZES[None]


def fn(params, x):
    body = lambda total, w: (total + jnp.sin(x @ w), None)
    return jax.lax.scan(body, jnp.zeros((len(x), 24)), params["w"])[0]


def test_an_error_counts_by_the_mean_square_of_its_input():
    choices = [Choice("w", "w", int3, "", (1,), (0,))]
    found = importances(fn, PARAMS, (X,), [(X[:150],), (X[150:],)], choices, False)["w"]
    squares = (X**2).mean(0)
    expected = np.broadcast_to((squares / squares.mean())[None, :, None], (3, 40, 24))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("fmt", [int3, Codebook(3)], ids=lambda f: f.name)
def test_outputs_are_nearer_than_with_scales_fitted_to_weights(fmt):
    params = {"w": PARAMS["w"] / 20}
    y = fn(params, X)
    off = lambda q_fn, q: float(jnp.linalg.norm(q_fn(q, X) - y))
    plain = quantize(fn, params, X, formats=fmt, fit="mse")
    ours = quantize(fn, params, X, formats=fmt, fit="output", batches=[(X,)])
    assert off(*ours) < 0.95 * off(*plain)


def test_without_data_it_is_one_clear_line():
    with pytest.raises(ValueError, match="calibration needs data"):
        quantize(fn, PARAMS, X, formats=int3, fit="output")
