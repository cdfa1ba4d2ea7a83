"""Matrices to round, and inputs that correlate."""

import jax.numpy as jnp
import numpy as np


def problem(rows=12, cols=40, n=300, seed=0):
    """A weight, and inputs of which each resembles its neighbours."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, cols)).cumsum(1) / 3 + rng.normal(size=(n, cols))
    w = rng.normal(size=(rows, cols))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def output_error(x, new, w):
    """Of the outputs, relative to them."""
    return float(jnp.linalg.norm(x @ (new - w).T) / jnp.linalg.norm(x @ w.T))
