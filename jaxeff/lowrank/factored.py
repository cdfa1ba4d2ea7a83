"""A factored weight: two thin arrays standing where a full one stood.

Multiplying by `u @ v` in two steps costs `rank * (rows + cols)` instead of
`rows * cols`. A convolution becomes one with `rank` outputs and a 1x1 one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxeff.program import Conv, Dot, keep, Leaf
from jaxeff.tree import pytree, static


@pytree
class Factored(Leaf):
    """An array stored as the product of two.

    `u` has dims (*batch, *rows, rank), `v` has (*batch, rank, *cols); the array
    has (*batch, *rows, *cols). Leading batch dims are there or sliced away.

    Law: `dense()` is `u` times `v`, summed over the rank.
    """

    u: Float[Array, "..."]
    v: Float[Array, "..."]
    cols: int = static()  # how many dims of `v` follow its rank

    @property
    def batch(self) -> int:
        """How many leading dims both factors share."""
        return self.v.ndim - 1 - self.cols

    @property
    def rows(self) -> int:
        """How many dims of `u` lie between its batch and its rank."""
        return self.u.ndim - 1 - self.batch

    @property
    def rank(self) -> int:
        """The dim that is summed over."""
        return self.u.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        return tuple(self.u.shape[:-1]) + tuple(self.v.shape[self.batch + 1 :])

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.v.dtype

    def dense(self) -> Array:
        """The array it stands for."""
        b = self.batch
        u = self.u.reshape(*self.u.shape[:b], -1, self.rank)
        v = self.v.reshape(*self.v.shape[: b + 1], -1)
        return jnp.matmul(u, v).reshape(self.shape)

    def astype(self, dtype: Any) -> Any:
        """The same factors in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, u=self.u.astype(dtype), v=self.v.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight with its dims in another order, if rows stay together."""
        b, n = self.batch, self.batch + self.rows
        order = [int(d) for d in permutation]
        is_row = [b <= d < n for d in order]
        if order[:b] != list(range(b)):
            return NotImplemented
        rows = [d for d in order[b:] if d < n]
        cols = [d for d in order[b:] if d >= n]
        u = self.u.transpose([*range(b), *rows, n])
        v = self.v.transpose([*range(b), b, *(d - n + b + 1 for d in cols)])
        if order[b:] == rows + cols:
            return Factored(u, v, self.cols)
        if order[b:] != cols + rows or not any(is_row):
            return NotImplemented
        # (u v)^T = v^T u^T: the rank moves to the other end of each.
        return Factored(_moveaxis(v, b, -1), _moveaxis(u, -1, b), self.rows)

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with dims split or merged, if rows and cols stay apart."""
        b = self.batch
        sizes = self.shape
        batch = sizes[:b]
        rows, cols = (
            math.prod(sizes[b : b + self.rows]),
            math.prod(sizes[b + self.rows :]),
        )
        if tuple(shape[:b]) != batch:
            return NotImplemented
        rest = list(shape[b:])
        # A dim of size 1 may go to either side: the earliest cut that fits.
        for k in range(len(rest) + 1):
            if math.prod(rest[:k]) == rows and math.prod(rest[k:]) == cols:
                u = self.u.reshape(*batch, *rest[:k], self.rank)
                v = self.v.reshape(*batch, self.rank, *rest[k:])
                return Factored(u, v, len(rest) - k)
        return NotImplemented

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> "Factored":
        """The weight without the indices of `dim` where `mask` is False."""
        n, u, v = self.batch + self.rows, self.u, self.v
        if dim < n:
            u = keep(u, dim, mask)
        if dim < self.batch:
            v = keep(v, dim, mask)
        if dim >= n:
            v = keep(v, dim - n + self.batch + 1, mask)
        return Factored(u, v, self.cols)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        """Rows of the first factor, times the second."""
        if self.batch or self.rows != 1 or dim != 0:
            return NotImplemented
        rows = gather(self.u)
        # The rank was the last dim of `u`; a look-up leaves it where it puts the
        # array's other dims, in front of the indices' or behind.
        at = _moved(gather, self.u.shape, dim)
        return (
            jnp.tensordot(rows, self.v, ((at,), (0,)))
            if at == rows.ndim - 1
            else (NotImplemented)
        )

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())` in two products."""
        d, b, n = dot.dims, self.batch, self.batch + self.rows
        if b or d.w_batch:
            return NotImplemented
        contract = sorted(d.w_contract)
        if contract == list(range(n)):
            first, second, rank_last = self.u, self.v, True
        elif contract == list(range(n, self.ndim)):
            first, second, rank_last = self.v, self.u, False
        else:
            return NotImplemented
        pairs = sorted(zip(d.w_contract, d.x_contract, strict=True))
        offset = 0 if rank_last else n - 1
        inner = ([p[1] for p in pairs], [p[0] - offset for p in pairs])
        params = {**dot.params, "preferred_element_type": None}
        # (x's free dims, rank), then (x's free dims, the weight's free dims).
        h = jax.lax.dot_general(x, first, (inner, ((), ())), **params)
        rank = 0 if rank_last else second.ndim - 1
        y = jax.lax.dot_general(
            h, second, (([h.ndim - 1], [rank]), ((), ())), **dot.params
        )
        if not dot.weight_first:
            return y
        free = h.ndim - 1
        return jnp.moveaxis(y, range(free), range(y.ndim - free, y.ndim))

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())` as a convolution to `rank` channels and a 1x1 one."""
        p = conv.params
        if self.batch or p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
            return NotImplemented
        out = conv.out_dim
        if self.cols == 1 and out == self.ndim - 1:
            kernel, mix = self.u, self.v  # (..., rank) and (rank, out)
        elif self.rows == 1 and out == 0:
            kernel, mix = self.v, self.u.T  # (rank, ...) and (rank, out)
        else:
            return NotImplemented
        h = conv(x, kernel, preferred_element_type=None)
        channel = conv.output_channel_dim
        y = jax.lax.dot_general(
            h,
            mix,
            (((channel,), (0,)), ((), ())),
            precision=None,
            preferred_element_type=p["preferred_element_type"],
        )
        return jnp.moveaxis(y, -1, channel)


def _moveaxis(x: Any, source: int, to: int) -> Any:
    """As `jnp.moveaxis`, by a method that arrays and leaves share."""
    order = [d for d in range(x.ndim) if d != source % x.ndim]
    order.insert(to % x.ndim, source % x.ndim)
    return x.transpose(order)


def _moved(gather: Callable[[Array], Array], shape: Sequence[int], dim: int) -> int:
    """Where `gather` along `dim` puts the last dim of an array of that shape."""

    def result(last: int) -> tuple[int, ...]:
        sizes = (*shape[:-1], last)
        return jax.eval_shape(gather, jax.ShapeDtypeStruct(sizes, jnp.float32)).shape

    one, two = result(1), result(2)
    (at,) = (i for i in range(len(one)) if one[i] != two[i])
    return at
