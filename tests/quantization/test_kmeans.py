import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization.kmeans import kmeans, nearest

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_each_centre_is_the_weighted_mean_of_what_is_nearest_to_it",
}


@pytest.mark.parametrize("dim", [1, 3])
def test_clusters_that_lie_apart_are_found(dim):
    rng = np.random.default_rng(0)
    centres = rng.permutation(8)[:, None] * 10.0 + rng.normal(size=(8, dim))
    x = jnp.asarray(np.repeat(centres, 40, 0) + rng.normal(size=(320, dim)) / 100)
    found = kmeans(x, jnp.ones_like(x), k=8)
    order = lambda c: np.asarray(c)[np.argsort(np.asarray(c)[:, 0])]
    np.testing.assert_allclose(order(found), order(centres), atol=0.02)


def test_each_centre_is_the_weighted_mean_of_what_is_nearest_to_it():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.random((500, 2)), jnp.float32) for _ in range(2))
    centres = kmeans(x, weight, k=6, steps=200)
    code, off = nearest(x, weight, centres)
    all = (weight[:, None] * (x[:, None] - centres[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(code, all.argmin(1))
    np.testing.assert_allclose(off, all.min(1), rtol=1e-5)
    for i in range(6):
        mine = np.asarray(code) == i
        mean = (weight * x)[mine].sum(0) / weight[mine].sum(0)
        np.testing.assert_allclose(centres[i], mean, rtol=1e-4)


def test_weights_draw_centres_and_no_centre_is_wasted():
    x = jnp.concatenate([jnp.zeros(1000), jnp.arange(1.0, 8)])[:, None]
    weight = jnp.where(x > 0, 1.0, 1e-3)
    centres = jax.jit(lambda x, w: kmeans(x, w, k=8))(x, weight)
    np.testing.assert_allclose(np.sort(centres[:, 0]), np.arange(8.0), atol=1e-6)
