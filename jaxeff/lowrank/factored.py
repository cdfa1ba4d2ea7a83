"""A factored weight: two thin arrays standing where a full one stood.

Multiplying by `u @ v` in two steps costs `rank * (rows + cols)` instead of
`rows * cols`. A convolution becomes one with `rank` outputs and a 1x1 one.

Source: for convolutions Zhang et al. 2015, arXiv:1505.06798, section 3.1.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxeff.program import Conv, dense, Dot, keep, Leaf, take_places
from jaxeff.tree import pytree, static


@pytree
class Factored(Leaf):
    """An array stored as the product of two.

    `u` has dims (*batch, *rows, rank), `v` has (*batch, rank, *cols); the array
    has (*batch, *rows, *cols). Leading batch dims are there or sliced away. The
    factors may be compressed in their turn.

    Law: `dense()` is `u` times `v`, summed over the rank.
    """

    u: Any  # Float[Array, "*batch *rows rank"], or a leaf of that shape
    v: Any  # Float[Array, "*batch rank *cols"], or a leaf of that shape
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
        """The length of the dim that is summed over."""
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
        b, (u, v) = self.batch, dense((self.u, self.v))
        u = u.reshape(*u.shape[:b], -1, self.rank)
        v = v.reshape(*v.shape[: b + 1], -1)
        return jnp.matmul(u, v).reshape(self.shape)

    def astype(self, dtype: Any) -> Any:
        """The same factors in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return _factored(self.u.astype(dtype), self.v.astype(dtype), self.cols)

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight with its dims in another order, if rows stay together."""
        b, n = self.batch, self.batch + self.rows
        order = [int(d) for d in permutation]
        if order[:b] != list(range(b)):
            return NotImplemented
        rows = [d for d in order[b:] if d < n]
        cols = [d for d in order[b:] if d >= n]
        v_cols = [d - n + b + 1 for d in cols]
        if order[b:] == rows + cols:
            u = self.u.transpose((*range(b), *rows, n))
            v = self.v.transpose((*range(b), b, *v_cols))
            return _factored(u, v, self.cols)
        if order[b:] == cols + rows:  # (u v)^T = v^T u^T
            u = self.v.transpose((*range(b), *v_cols, b))
            v = self.u.transpose((*range(b), n, *rows))
            return _factored(u, v, self.rows)
        return NotImplemented

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with dims split or merged, if rows and cols stay apart."""
        b, n = self.batch, self.batch + self.rows
        batch, rest = self.shape[:b], list(shape[b:])
        rows, cols = math.prod(self.shape[b:n]), math.prod(self.shape[n:])
        if tuple(shape[:b]) != batch:
            return NotImplemented
        # A dim of size 1 may go to either side: the earliest cut that fits.
        for k in range(1, len(rest)):
            if math.prod(rest[:k]) == rows and math.prod(rest[k:]) == cols:
                u = self.u.reshape((*batch, *rest[:k], self.rank))
                v = self.v.reshape((*batch, self.rank, *rest[k:]))
                return _factored(u, v, len(rest) - k)
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

    def _labels(self) -> tuple[str, str, str, str]:
        """A letter for each dim of the weight, of `u` and of `v`; and those left."""
        b, n, w = self.batch, self.batch + self.rows, string.ascii_letters[: self.ndim]
        rank, *left = string.ascii_letters[self.ndim :]
        return w, w[:n] + rank, w[:b] + rank + w[n:], "".join(left)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        """Rows of one factor, times the other."""
        b, n = self.batch, self.batch + self.rows
        if dim < b:
            return NotImplemented
        # To the look-up a factor is a weight whose other side has the length rank.
        if dim < n:
            own, other, at = self.u, self.v, n
        else:
            own, other, at = self.v, self.u, n - 1
        mine = range(n) if dim < n else [*range(b), *range(n, self.ndim)]
        shape = [self.shape[d] if d in mine else 1 for d in range(self.ndim)]
        shape[at] = self.rank
        picked = gather(own.reshape(tuple(shape)))
        places = take_places(gather, shape, dim)

        w, u, v, left = self._labels()
        rank, labels = u[-1], list(left[: picked.ndim])
        for d, place in places.items():
            labels[place] = w[d]
        inner = [rank if i == places[at] else a for i, a in enumerate(labels)]
        ones = [places[d] for d in range(self.ndim) if d not in (*mine, at)]
        inner = [a for i, a in enumerate(inner) if i not in ones]
        rest = v if dim < n else u
        equation = f"{''.join(inner)},{rest}->{''.join(labels)}"
        return jnp.einsum(equation, picked.squeeze(tuple(ones)), other)

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())` in two products."""
        d, (w, u, v, left) = dot.dims, self._labels()
        if not any(i >= self.batch for i in d.w_contract):
            return NotImplemented
        x_labels = list(left[: x.ndim])
        met = zip(d.x_contract + d.x_batch, d.w_contract + d.w_batch, strict=True)
        for i, j in met:
            x_labels[i] = w[j]
        batch = [w[i] for i in d.w_batch]
        of_x = [x_labels[i] for i in d.x_free(x.ndim)]
        of_w = [w[i] for i in d.w_free(self.ndim)]
        out = batch + (of_w + of_x if dot.weight_first else of_x + of_w)
        # The factor that holds more of what is summed comes first.
        held = lambda labels: math.prod(
            self.shape[i] for i in d.w_contract if w[i] in labels
        )
        first, second = (self.u, u), (self.v, v)
        if held(v) > held(u):
            first, second = second, first
        seen = dict.fromkeys([*x_labels, *first[1]])
        between = [a for a in seen if a in out or a in second[1]]
        h = _einsum(x_labels, first[1], between, x, first[0], dot.params, None)
        out_dtype = dot.params["preferred_element_type"]
        return _einsum(between, second[1], out, h, second[0], dot.params, out_dtype)

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())` as a convolution to `rank` channels and a 1x1 one."""
        p = conv.params
        if self.batch or p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
            return NotImplemented
        if self.cols == 1 and conv.out_dim == self.ndim - 1:
            kernel, mix, mixed = self.u, self.v, 0  # (..., rank) and (rank, out)
        elif self.rows == 1 and conv.out_dim == 0:
            kernel, mix, mixed = self.v, self.u, 1  # (rank, ...) and (out, rank)
        else:
            return NotImplemented
        h = conv(x, kernel, preferred_element_type=None)
        channel, labels = conv.output_channel_dim, list(string.ascii_letters[: h.ndim])
        new = string.ascii_letters[h.ndim]
        mixing = [new, new]
        mixing[mixed] = labels[channel]
        out = [new if i == channel else a for i, a in enumerate(labels)]
        return _einsum(labels, mixing, out, h, mix, p, p["preferred_element_type"])


def _factored(u: Any, v: Any, cols: int) -> Any:
    """The leaf of two factors, unless one of them declined."""
    declined = u is NotImplemented or v is NotImplemented
    return NotImplemented if declined else Factored(u, v, cols)


def _einsum(
    a: Sequence[str],
    b: Sequence[str],
    out: Sequence[str],
    x: Array,
    w: Array,
    params: dict[str, Any],
    dtype: Any,
) -> Array:
    return jnp.einsum(
        f"{''.join(a)},{''.join(b)}->{''.join(out)}",
        x,
        w,
        precision=params["precision"],
        preferred_element_type=dtype,
    )
