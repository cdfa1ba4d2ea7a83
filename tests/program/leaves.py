"""Two compressed weights: one that does everything itself, one that does nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.program import Leaf
from jaxeff.tree import path_name, pytree, static


@pytree
class Scaled(Leaf):
    """An array times a number: not a useful format, but every operation is its own."""

    values: jax.Array
    factor: float = static(default=0.5)

    @property
    def shape(self):
        return tuple(self.values.shape)

    @property
    def dtype(self):
        return self.values.dtype

    def dense(self):
        return self.values * jnp.asarray(self.factor, self.dtype)

    def _view(self, values):
        return Scaled(values, self.factor)

    def _times(self, y):
        return y * jnp.asarray(self.factor, y.dtype)

    def astype(self, dtype):
        return self._view(self.values.astype(dtype))

    def transpose(self, permutation):
        return self._view(self.values.transpose(permutation))

    def reshape(self, shape):
        return self._view(self.values.reshape(shape))

    def dot(self, x, dot):
        return self._times(dot(x, self.values))

    def conv(self, x, conv):
        return self._times(conv(x, self.values))

    def take(self, gather, dim):
        return self._times(gather(self.values))

    def keep(self, dim, mask):
        at = (slice(None),) * dim + (np.flatnonzero(mask),)
        return self._view(self.values[at])


@pytree
class Shy(Leaf):
    """An array that declines every operation."""

    values: jax.Array

    shape = Scaled.shape
    dtype = Scaled.dtype

    def dense(self):
        return self.values


def compress(params, kind=Scaled, only=lambda path: True):
    """Every array of two or more dims, as a leaf of that kind."""
    return jax.tree_util.tree_map_with_path(
        lambda k, x: kind(x) if x.ndim > 1 and only(path_name(k)) else x, params
    )
