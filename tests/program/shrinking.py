"""What the tests of shrinking share: what to keep, and the distance of two results."""

import jax
import numpy as np

from jaxeff.program import keep_indices, make_plan, resize


def random_keep(couplings, rng, fraction=0.5):
    """Random indices to keep of every free coupling, at least one of each."""
    keep = {}
    for c in couplings.free:
        mask = rng.random(c.size) < fraction
        mask[rng.integers(c.size)] = True
        keep[c.name] = mask
    return keep


def shrunk(fn, params, couplings, keep):
    """The function and the weights without those indices."""
    plan = make_plan(couplings, keep)
    return resize(fn, plan), keep_indices(params, couplings, keep)


def distance(a, b):
    """The largest difference anywhere, in units of the largest number in `b`."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape and np.isfinite(y).all()
        if y.size:
            worst = max(worst, np.abs(x - y).max() / max(np.abs(y).max(), 1e-3))
    return worst
