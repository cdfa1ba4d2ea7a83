"""Keys and values of a transformer's decoding in few bits.

At long contexts the cache takes more memory than the weights, and each new token
reads all of it. Each token's keys and values of a head are rounded when they are
written, with a scale of their own, and decoded one layer at a time.

Source: per-token scales: Sheng et al. 2023, arXiv:2303.06865 (FlexGen), section 5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxeff.tree import pytree, static

from .arrays import QArray, quantize_array
from .formats import Format, int8


@pytree
class CachedTokens:
    """Stands where an array of (layers, batch, length, heads, head dim) stood.

    Law: what is read is what was written, rounded as `quantize_array` rounds it, and
    0 where nothing was.

    Its arrays are those of a `QArray`, but it is no compressed weight: a lifted
    function takes it for what it is.

    Attributes:
        parts: codes, scales and zero points.
        kind: of the `QArray` they make up.
        format: of the numbers.
    """

    parts: tuple[Array, ...]
    kind: Any = static()
    format: Format = static()

    @classmethod
    def of(cls, array: QArray, format: Format) -> "CachedTokens":
        """From an array that is rounded already."""
        parts, kind = jax.tree.flatten(array)
        return cls(tuple(parts), kind, format)

    @property
    def array(self) -> QArray:
        """All of it."""
        return jax.tree.unflatten(self.kind, self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for."""
        return self.array.shape

    def write(
        self,
        new: Float[Array, "b s heads head_dim"],
        layer: int | Int[Array, ""],
        start: int | Int[Array, ""],
    ) -> "CachedTokens":
        """With those tokens from `start` on in a layer."""
        q = _rounded(new[None].astype(self.array.dtype), self.format)
        at = (layer, 0, start, 0, 0)
        put = lambda old, part: jax.lax.dynamic_update_slice(old, part, at)
        return self.of(jax.tree.map(put, self.array, q), self.format)

    def read(
        self, layer: int | Int[Array, ""]
    ) -> Float[Array, "b length heads head_dim"]:
        """All tokens of a layer."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, layer)
        return jax.tree.map(pick, self.array).dense()[0]


def quantize_cache(cache: PyTree, format: Any = int8) -> PyTree:
    """A cache of keys and values that holds few bits.

    Args:
        cache: its arrays of five dims (layers, batch, length, heads, head dim) are
            rounded, for a model that writes and reads them by methods `write` and
            `read` where they have them, as those of `jaxeff.models` do.
        format: a `Format`: of each token's head, with one scale or one for each group.

    Raises:
        ValueError: there is no such array, the format is for products, or its groups
            do not divide the head dim.
    """
    if not isinstance(format, Format) or format.activations or format.outputs != 1:
        raise ValueError(
            "each token's head is rounded by itself, and only stored: its format is a "
            "`Format` without activations and without tiles, such as int8, int4 or "
            f"fp8 of `jaxeff.quantization`, got "
            f"{format.name if isinstance(format, Format) else repr(format)}."
        )
    found = 0

    def one(x: Any) -> Any:
        nonlocal found
        if getattr(x, "ndim", 0) != 5 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        found += 1
        return CachedTokens.of(jax.jit(_rounded, static_argnums=1)(x, format), format)

    new = jax.tree.map(one, cache, is_leaf=lambda x: isinstance(x, CachedTokens))
    if not found:
        raise ValueError(
            "a cache has arrays of (layers, batch, length, heads, head dim), and this "
            "has none that is not rounded already: pass what `init_cache` returns."
        )
    return new


def _rounded(x: Float[Array, "l b s heads head_dim"], format: Format) -> QArray:
    return quantize_array(x, format, (4,), (0, 1, 2, 3))
