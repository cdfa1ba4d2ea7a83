"""Which weights come and go together: one by one, in groups of m, or in tiles.

A pattern turns an array into units, each dropped or kept as a whole, and says which
units compete with each other. How many of them go is said elsewhere.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .dims import Dims, dims_of, DimsOf


@runtime_checkable
class Pattern(Protocol):
    """What the rest needs to know of a pattern; `path` names the weight."""

    def check(self, path: str, shape: Dims, sparsity: float | int) -> None:
        """Refuses a shape that does not divide, or a final sparsity out of reach."""
        ...

    def layer(self, path: str, shape: Dims) -> Dims:
        """The shape of one layer: without the dims whose entries do not compete."""
        ...

    def units(self, path: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of `x` over each unit."""
        ...

    def along(self, path: str, shape: Dims) -> Dims:
        """The dims of the units of an array of that shape that compete."""
        ...

    def expand(self, path: str, kept: Bool[Array, "..."], shape: Dims) -> Array:
        """The mask of the weights, from that of the units."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight on its own.

    Attributes:
        per: dims of which every index has its own count: `weight_dims(...).stacked`
            gives every layer of a scanned stack the same sparsity; an output dim does
            so for every neuron.
    """

    per: DimsOf = ()

    def check(self, path: str, shape: Dims, sparsity: float | int) -> None:
        """Any shape and any sparsity will do; the dims have to exist."""
        self.along(path, shape)

    def layer(self, path: str, shape: Dims) -> Dims:
        """The shape without the dims `per`."""
        return tuple(shape[d] for d in self.along(path, shape))

    def units(self, path: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The weights."""
        return x

    def along(self, path: str, shape: Dims) -> Dims:
        """All but the dims `per`."""
        per = dims_of(self.per, path, len(shape)) or ()
        return tuple(d for d in range(len(shape)) if d not in per)

    def expand(self, path: str, kept: Bool[Array, "..."], shape: Dims) -> Array:
        """The mask itself."""
        return kept


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles of `rows` × `columns` weights.

    Attributes:
        rows, columns: the size of a tile; they divide the dims they lie along.
        dims: the two dims of each weight that tiles lie along.
        per: as for `Unstructured`, of other dims than these two.

    Source: Narang et al. 2017, arXiv:1711.02782.
    """

    rows: int
    columns: int
    dims: DimsOf = (-2, -1)
    per: DimsOf = ()

    def check(self, path: str, shape: Dims, sparsity: float | int) -> None:
        """Tiles divide both dims, and at least one goes and one stays."""
        self._tile(path, shape)
        self.along(path, shape)
        units = self._split(path, shape)[::2]
        n = math.prod(units[d] for d in self.along(path, shape))
        if not 0 < round(sparsity * n) < n and sparsity > 0:
            raise ValueError(
                f"tiles of {self.rows} x {self.columns} cut a layer of {path} of shape "
                f"{list(shape)} into {n}, so sparsity {sparsity:g} would drop "
                f"{round(sparsity * n)} of them. Use smaller tiles, or leave this "
                "weight out with `only=`."
            )

    def layer(self, path: str, shape: Dims) -> Dims:
        """The shape without the dims `per`."""
        return tuple(shape[d] for d in self.along(path, shape))

    def units(self, path: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum over each tile."""
        split = x.reshape(self._split(path, x.shape))
        return jnp.sum(split, axis=tuple(range(1, split.ndim, 2)))

    def along(self, path: str, shape: Dims) -> Dims:
        """All but the dims `per`."""
        return Unstructured(self.per).along(path, shape)

    def expand(self, path: str, kept: Bool[Array, "..."], shape: Dims) -> Array:
        """Every weight as its tile."""
        split = self._split(path, shape)
        kept = kept.reshape([n if i % 2 == 0 else 1 for i, n in enumerate(split)])
        return jnp.broadcast_to(kept, split).reshape(shape)

    def _split(self, path: str, shape: Dims) -> Dims:
        """Every dim as the number of tiles and the size of one."""
        tile = self._tile(path, shape)
        return tuple(x for n, t in zip(shape, tile, strict=True) for x in (n // t, t))

    def _tile(self, path: str, shape: Dims) -> Dims:
        dims = dims_of(self.dims, path, len(shape))
        if dims is None or len(dims) != 2:
            raise ValueError(
                f"a tile lies along two dims, but {path} has {dims} given. Name two."
            )
        tile = dict(zip(dims, (self.rows, self.columns), strict=True))
        if any(t < 1 or shape[d] % t for d, t in tile.items()):
            raise ValueError(
                f"tiles of {self.rows} x {self.columns} divide the dims {dims} of a "
                f"weight, but {path} has shape {list(shape)}. Choose divisors of "
                f"{[shape[d] for d in dims]}, or leave this weight out with `only=`."
            )
        return tuple(tile.get(d, 1) for d in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class NofM:
    """At most `n` of every `m` neighbours stay: 2:4 is what GPUs have kernels for.

    The schedule ends at the sparsity 1 - n / m; on the way there, at sparsity s,
    round(s * m) go from every group. A distribution over layers would break the
    groups, so all have the same sparsity.

    Attributes:
        n, m: how many stay in a group, and its size.
        dims: the dims that products sum over, `weight_dims(fn, params, x).contract`,
            or given by hand: -2 is that of a dense kernel. Several are taken as
            one, the last changing fastest; `m` divides their product.

    Source: Mishra et al. 2021, arXiv:2104.08378.
    """

    n: int
    m: int
    dims: DimsOf

    def __post_init__(self):
        if not 0 < self.n < self.m:
            raise ValueError(
                f"N:M keeps some but not all of a group, 0 < n < m, got n={self.n} and "
                f"m={self.m}. 2:4 is n=2, m=4."
            )

    def check(self, path: str, shape: Dims, sparsity: float | int) -> None:
        """Groups divide the dims, and the schedule ends at theirs."""
        size = math.prod(shape[d] for d in self._dims(path, shape))
        if size % self.m:
            raise ValueError(
                f"groups of {self.m} divide the {size} weights that {path} of shape "
                f"{list(shape)} sums over, but {size % self.m} are left. Choose "
                "another m, or leave this weight out with `only=`."
            )
        if abs(sparsity * self.m - (self.m - self.n)) > 1e-3:
            raise ValueError(
                f"{self.n}:{self.m} drops {1 - self.n / self.m:g} of the weights, but "
                f"the schedule ends at {sparsity:g}. Let it end at 1 - n / m."
            )

    def layer(self, path: str, shape: Dims) -> Dims:
        """One group: nothing else competes."""
        return (self.m,)

    def units(self, path: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The weights, with the groups as the last dim."""
        rest, dims = self._order(path, x.shape)
        x = x.transpose(*rest, *dims)
        return x.reshape(*x.shape[: len(rest)], -1, self.m)

    def along(self, path: str, shape: Dims) -> Dims:
        """The last dim of the units."""
        return (len(self._order(path, shape)[0]) + 1,)

    def expand(self, path: str, kept: Bool[Array, "..."], shape: Dims) -> Array:
        """The mask with its dims in their places."""
        rest, dims = self._order(path, shape)
        order = (*rest, *dims)
        back = tuple(order.index(d) for d in range(len(shape)))
        return kept.reshape([shape[d] for d in order]).transpose(back)

    def _dims(self, path: str, shape: Dims) -> Dims:
        dims = dims_of(self.dims, path, len(shape))
        if not dims:
            raise ValueError(
                f"N:M groups weights along the dims that a product sums over, but none "
                f"are known for {path}. `weight_dims(fn, params, x).contract` holds "
                "those that one product, or several alike, use: leave the others out "
                "with `only=list(...)` of it, or give their dims by hand."
            )
        return dims

    def _order(self, path: str, shape: Dims) -> tuple[Dims, Dims]:
        dims = self._dims(path, shape)
        return tuple(d for d in range(len(shape)) if d not in dims), dims
