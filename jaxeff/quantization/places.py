"""The scales of a part of a weight: from the matrices of calibration and back.

Calibration sees a weight as matrices, and one stacked for a scan part by part (see
`program.calibrate`). Which weights share a scale is said in the weight's own dims.
A `Place` knows where the entries of a part's matrices lie there.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff.program import Part

from . import blocks, scales as scaling
from .formats import Format
from .scales import Scales


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of a weight, in the weight's dims.

    Attributes:
        at: index of each entry of the part's matrices in the flattened window.
        index: of the window, in those leading dims that nothing shares a scale along.
        window: shape of the smallest slice, by leading dims, that holds the part: of
            length 1 along the dims of `index`.
        shared: neighbours along each dim of the window that share a scale.
        batch: dims along which nothing is shared.
    """

    at: np.ndarray
    index: tuple[int, ...]
    window: tuple[int, ...]
    shared: tuple[int, ...]
    batch: tuple[int, ...]

    def array(self, matrices: Float[Array, "..."], fill: float | Array) -> Array:
        """The window with those entries, and `fill` elsewhere."""
        matrices = jnp.broadcast_to(matrices, self.at.shape)
        flat = jnp.full(math.prod(self.window), fill, matrices.dtype)
        return flat.at[self.at].set(matrices).reshape(self.window)

    def matrices(self, array: Array) -> Array:
        """The part's matrices of an array of the window's shape or its blocks'."""
        return blocks.expand(array, self.window).reshape(-1)[self.at]

    def fit(
        self,
        weight: Array,
        format: Format,
        method: str,
        importance: Float[Array, "..."] | None = None,
        outer: Array | None = None,
    ) -> Scales:
        """The scales of the window; those of the part's blocks are right.

        Args:
            weight: all of it, as it was.
            format, method: see `scales.fit`.
            importance: of each entry of the matrices; it may broadcast. What shares a
                scale with them and is of another part counts as they do in the mean.
            outer: of the window, if it is known.
        """
        by = None
        if importance is not None:
            by = self.array(importance, jnp.mean(importance))
        window = weight[self.index].reshape(self.window)
        return _fit(window, format, self.shared, self.batch, method, by, outer)

    def inside(self, scales: PyTree) -> PyTree:
        """Of arrays with a number for each block of the weight those of the window."""

        def cut(x: Array) -> Array:
            mine = x[self.index]
            return mine.reshape(*[1] * len(self.index), *mine.shape)

        return jax.tree.map(cut, scales)

    @property
    def ours(self) -> Array:
        """For each block of the window whether the part has a weight in it."""
        within = self.array(jnp.ones(()), 0.0)
        return blocks.total(within, self.shared) > 0

    def group_starts(self, group: int) -> np.ndarray | None:
        """The first entry of each group, where groups are runs of a row's columns.

        Returns:
            Its index in the window, (groups, rows, n); None if a block is no run, or
            reaches into other parts.
        """
        groups, rows, cols = self.at.shape
        if cols % group or math.prod(self.shared) != group:
            return None
        where = np.unravel_index(self.at, self.window)
        block = [i // n for i, n in zip(where, self.shared, strict=True)]
        lengths = [m // n for m, n in zip(self.window, self.shared, strict=True)]
        ids = np.ravel_multi_index(block, lengths).reshape(groups, rows, -1, group)
        runs = (ids == ids[..., :1]).all()
        alone = len(np.unique(ids[..., 0])) == ids[..., 0].size
        return self.at.reshape(ids.shape)[..., 0] if runs and alone else None

    def blocks_at(self, starts: np.ndarray, values: Array) -> Array:
        """A number for each block of the window, from those of its first entries."""
        where = np.unravel_index(starts, self.window)
        block = tuple(i // n for i, n in zip(where, self.shared, strict=True))
        lengths = [m // n for m, n in zip(self.window, self.shared, strict=True)]
        return jnp.ones(lengths, values.dtype).at[block].set(values)

    def put(self, all: Scales, found: Scales) -> Scales:
        """The scales of the whole weight, with those of the part's blocks replaced.

        Args:
            all: of the weight.
            found: of the window.
        """
        ours = self.array(jnp.ones(()), 0.0)

        def put(new: Array, old: Array) -> Array:
            inside = old[self.index]
            size = [m // k for m, k in zip(self.window, new.shape, strict=True)]
            mine = blocks.total(ours, size).reshape(inside.shape) > 0
            # JAX selects among numbers of 8 bits by way of wider ones.
            wide = new.reshape(inside.shape).astype(jnp.float32)
            now = jnp.where(mine, wide, inside.astype(jnp.float32))
            return old.at[self.index].set(now.astype(old.dtype))

        return jax.tree.map(put, found, all)


_fit = jax.jit(
    lambda w, format, shared, batch, method, importance, outer: scaling.fit(
        w, format, shared, batch, method=method, importance=importance, outer=outer
    ),
    static_argnums=(1, 2, 3, 4),
)


def place(
    part: Part,
    shape: Sequence[int],
    shared: Sequence[int],
    batch: Sequence[int] = (),
) -> Place:
    """Where a part lies in a weight of that shape.

    Args:
        part: with its elements.
        shape: of the weight.
        shared: neighbours along each dim that share a scale.
        batch: dims along which nothing is shared.
    """
    at = np.asarray(part.elements)
    first, last = int(at.min()), int(at.max())
    n = 0
    while n < len(shape) and n in batch:
        size = math.prod(shape[n + 1 :])
        if first // size != last // size:
            break
        n += 1
    size = math.prod(shape[n:])
    start = first // size * size
    index = tuple(int(i) for i in np.unravel_index(start, shape)[:n])
    window = (*[1] * n, *shape[n:])
    return Place(at - start, index, window, tuple(shared), tuple(batch))
