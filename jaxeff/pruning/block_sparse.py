"""Block-sparse weights: whole blocks are stored or are zero, and only stored ones
are multiplied.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxeff.program import Dot
from jaxeff.tree import pytree, static

from .sparse import Decoded


@pytree
class BlockArray(Decoded):
    """A matrix, or several, of which some blocks are stored and the rest is zero.

    A product with one matrix costs what its stored blocks cost.

    Law: `dense()` has the stored blocks at their places, zeros elsewhere.

    Attributes:
        blocks: those stored.
        places: of each block, counted row by row; beyond the last: it is a filler,
            for leading dims have room for as many blocks as the fullest needs.
        grid: how many blocks the matrix has down and across.
    """

    blocks: Float[Array, "*lead room height width"]
    places: Int[Array, "*lead room"]
    grid: tuple[int, int] = static()

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dims."""
        return tuple(self.places.shape[:-1])

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of a block."""
        return self.blocks.shape[-2], self.blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        (down, across), (height, width) = self.grid, self.block
        return (*self.lead, down * height, across * width)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.blocks.dtype

    @property
    def format(self) -> str:
        """What is stored: for tables."""
        return "blocks of {}x{}".format(*self.block)

    def dense(self) -> Array:
        """The array it stands for."""
        return _block_dense(self)

    def astype(self, dtype: Any) -> Any:
        """The same weight in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, blocks=self.blocks.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight, or with its last two dims swapped."""
        n, order = len(self.lead), [int(d) for d in permutation]
        if order == list(range(n + 2)):
            return self
        if order != [*range(n), n + 1, n]:
            return NotImplemented
        down, across = self.grid
        swapped = self.places % across * down + self.places // across
        places = jnp.where(self.places < down * across, swapped, down * across)
        return BlockArray(self.blocks.swapaxes(-1, -2), places, (across, down))

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight, if nothing changes."""
        return self if tuple(shape) == self.shape else NotImplemented

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without some of its leading indices, or without whole blocks."""
        n, kept = len(self.lead), np.flatnonzero(mask)
        if dim < n:
            blocks, places = (
                jnp.take(x, kept, axis=dim) for x in (self.blocks, self.places)
            )
            return dataclasses.replace(self, blocks=blocks, places=places)
        whole = mask.reshape(self.grid[dim - n], -1)
        if (whole.any(1) != whole.all(1)).any():
            return NotImplemented
        at = np.arange(self.grid[0] * self.grid[1]).reshape(self.grid)
        left = at[whole[:, 0]] if dim == n else at[:, whole[:, 0]]
        new = np.full(at.size + 1, left.size)  # what goes becomes a filler
        new[left.ravel()] = np.arange(left.size)
        places = jnp.asarray(new, self.places.dtype)[self.places]
        return _fitted(self.blocks, places, left.shape)

    def dot(self, x: Array, dot: Dot) -> Array:
        """`dot(x, self.dense())`, a product for each stored block."""
        d = dot.dims
        if self.lead or len(d.w_contract) != 1 or d.w_batch:
            return dot(x, self.dense())
        w = self.transpose((1, 0)) if d.w_contract == (1,) else self
        (down, across), (height, width) = w.grid, w.block
        free = d.x_free(x.ndim)
        sizes = [x.shape[i] for i in free]
        x = x.transpose((*free, *d.x_contract)).reshape(-1, down, height)
        stored = w.places < down * across
        met = x[:, jnp.where(stored, w.places // across, 0)]
        params, dtype = dot.params, dot.params["preferred_element_type"]
        # Sums over blocks are as exact as those within one.
        wide = jnp.promote_types(jnp.float32, jnp.result_type(x, w.blocks))
        parts = jnp.einsum(
            "nbh,bhw->bnw",
            met,
            w.blocks,
            precision=params["precision"],
            preferred_element_type=wide,
        )
        y = jnp.zeros((across, x.shape[0], width), wide)
        column = jnp.where(stored, w.places % across, across)
        y = y.at[column].add(parts, mode="drop").transpose(1, 0, 2)
        y = y.reshape(*sizes, across * width)
        y = jnp.moveaxis(y, -1, 0) if dot.weight_first else y
        return y.astype(dtype or jnp.result_type(x, w.blocks))


@jax.jit
def _block_dense(x: BlockArray) -> Array:
    (down, across), (height, width) = x.grid, x.block

    def one(blocks, places):
        zeros = jnp.zeros((down * across, height, width), blocks.dtype)
        all_blocks = zeros.at[places].set(blocks, mode="drop")
        all_blocks = all_blocks.reshape(down, across, height, width)
        return all_blocks.swapaxes(1, 2).reshape(down * height, across * width)

    for _ in x.lead:
        one = jax.vmap(one)
    return one(x.blocks, x.places)


def block_array(
    w: Float[Array, "..."], block: tuple[int, int], lead: int = 0
) -> BlockArray:
    """The blocks of a weight that are not all zero.

    Law: `block_array(w, block).dense()` equals `w`.

    Args:
        w: (*leading dims, rows, columns).
        block: height and width, which divide rows and columns.
        lead: how many leading dims there are.

    Raises:
        ValueError: blocks do not fill the matrix.
    """
    shape = tuple(w.shape[lead:])
    if len(shape) != 2 or shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"blocks of {block[0]} x {block[1]} fill a matrix whose sides are "
            f"multiples of these, got {shape}: choose other blocks."
        )
    grid = (shape[0] // block[0], shape[1] // block[1])
    cells = block_cells(jnp.asarray(w), block, lead)
    stored = jnp.any(cells != 0, axis=(-1, -2))
    number = jax.lax.broadcasted_iota(jnp.int32, stored.shape, lead)
    places = jnp.where(stored, number, grid[0] * grid[1])
    return _fitted(cells, places, grid)


def _fitted(blocks: Array, places: Array, grid: tuple[int, int]) -> BlockArray:
    """A `BlockArray` with no more fillers than it needs, if that can be known."""
    stored = places < grid[0] * grid[1]
    room = places.shape[-1]
    if not isinstance(places, jax.core.Tracer):
        room = max(1, int(np.asarray(stored).sum(-1).max(initial=0)))
    blocks, places = _first(blocks, places, stored, room)
    return BlockArray(blocks, places, grid)


@functools.partial(jax.jit, static_argnums=3)
def _first(
    blocks: Array, places: Array, stored: Array, room: int
) -> tuple[Array, Array]:
    order = jnp.argsort(~stored, axis=-1, stable=True)[..., :room]
    blocks = jnp.take_along_axis(blocks, order[..., None, None], axis=-3)
    return blocks, jnp.take_along_axis(places, order, axis=-1)


def block_cells(w: Any, block: tuple[int, int], lead: int) -> Any:
    """(*lead, number of blocks, height, width), counted row by row."""
    (rows, cols), first = w.shape[lead:], w.shape[:lead]
    down, across = rows // block[0], cols // block[1]
    w = w.reshape(*first, down, block[0], across, block[1]).swapaxes(-2, -3)
    return w.reshape(*first, down * across, *block)
