"""LoRA: a weight that stays, plus a product of thin factors that trains.

`adapt` gives weights such a second part. The first may be compressed already: on one
in 4 bits this is QLoRA. `merge` adds the two up again.

Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023,
arXiv:2305.14314.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree

from jaxeff import tree
from jaxeff.program import (
    Conv,
    dense,
    Dot,
    equations,
    is_leaf,
    keep,
    Leaf,
    lift,
    shapes,
    trace,
    unlift,
)
from jaxeff.tree import pytree, static

from .factored import Factored
from .factorize import cut_of


@pytree
class Adapted(Leaf):
    """An array stored as another one plus a thin product.

    Law: `dense()` is that of `base` plus `scale` times that of `delta`; products are
    the sum of those with either.

    Attributes:
        base: the weight that stays, an array or a leaf.
        delta: what is learned.
        scale: of `delta`.
    """

    base: Any
    delta: Factored
    scale: float = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.base.dtype

    def dense(self) -> Array:
        """The array it stands for."""
        base, delta = dense((self.base, self.delta))
        return (base + self.scale * delta).astype(self.dtype)

    def _both(self, change: Callable[[Any], Any]) -> Any:
        base, delta = change(self.base), change(self.delta)
        if base is NotImplemented or delta is NotImplemented:
            return NotImplemented
        return Adapted(base, delta, self.scale)

    def astype(self, dtype: Any) -> Any:
        """The same parts in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return self._both(lambda x: x.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight with its dims in another order."""
        return self._both(lambda x: x.transpose(permutation))

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with dims split or merged."""
        return self._both(lambda x: x.reshape(shape))

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without the indices of `dim` where `mask` is False."""
        return self._both(lambda x: keep(x, dim, mask))

    def _sum(self, run: Callable[[Any], Any]) -> Any:
        """What is done to either part, summed; to a dense one where it declines."""
        parts = []
        for part in (self.base, self.delta):
            y = run(part)
            parts.append(run(dense(part)) if y is NotImplemented else y)
        return (parts[0] + self.scale * parts[1]).astype(parts[0].dtype)

    def dot(self, x: Array, dot: Dot) -> Array:
        """`dot(x, self.dense())` in the products of the two parts."""
        return self._sum(lambda w: w.dot(x, dot) if is_leaf(w) else dot(x, w))

    def conv(self, x: Array, conv: Conv) -> Array:
        """`conv(x, self.dense())` in the convolutions of the two parts."""
        return self._sum(lambda w: w.conv(x, conv) if is_leaf(w) else conv(x, w))

    def take(self, gather: Callable[[Array], Array], dim: int) -> Array:
        """Rows of either part."""
        return self._sum(lambda w: w.take(gather, dim) if is_leaf(w) else gather(w))


def adapt(
    fn: Callable,
    params: PyTree,
    *args: Any,
    ranks: int | Mapping[str, int],
    alpha: float | int | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Callable, PyTree]:
    """The function, and weights with a thin product beside them that is zero yet.

    Train what `partition(params, "**/delta/**")` splits off; the rest, in however few
    bits, stays.

    Args:
        fn: `fn(params, *args)`.
        params: its weights, compressed or not. May be shapes.
        args: example inputs, or their shapes.
        ranks: one rank for every weight that can be cut in two, or pattern -> rank,
            where the first pattern that matches a weight counts.
        alpha: the product counts alpha / rank times, so that its learning rate need
            not change with the rank. By default the rank.
        key: draws the first factor; the second is zero.

    Returns:
        `lift(fn)` and the new weights, with which it computes the same.

    Raises:
        ValueError: a rank is below 1 or above what the weight has; a pattern matches
            no weight, or none that can be cut in two.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    rules = ranks if isinstance(ranks, Mapping) else {"**": ranks}
    weights = tree.paths(params, is_leaf)
    asked = tree.assign(rules, weights)
    program = trace(unlift(fn), shapes(params), *args)
    at = {where: eqn for where, eqn, _ in equations(program.jaxpr)}
    uses: dict[str, list] = {path: [] for path in weights}
    for site in program.sites:
        uses[site.path].append((site, at[site.where]))
    cuts = {path: cut_of(_shape(w), uses[path]) for path, w in weights.items()}
    reasons = {p: cut if isinstance(cut, str) else "" for p, cut in cuts.items()}
    tree.check_some(
        rules, reasons, does="adapts", way_out="Name kernels or embeddings."
    )
    key = jr.key(0) if key is None else key

    def adapted(keypath: tuple, w: Any) -> Any:
        path = tree.path_name(keypath)
        cut = cuts.get(path)
        if path not in asked or cut is None or isinstance(cut, str):
            return w
        number = list(weights).index(path)
        make = lambda key: _delta(w, cut, asked[path], path, jr.fold_in(key, number))
        shape_only = any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)
        )
        delta = jax.eval_shape(make, key) if shape_only else make(key)
        scale = 1.0 if alpha is None else float(alpha) / asked[path]
        return Adapted(w, delta, scale)

    new = jax.tree_util.tree_map_with_path(adapted, params, is_leaf=is_leaf)
    return lift(fn), new


def _shape(w: Any) -> Any:
    return jax.ShapeDtypeStruct(w.shape, w.dtype) if is_leaf(w) else w


def _delta(w: Any, cut: Any, rank: int, path: str, key: Key[Array, ""]) -> Factored:
    b, n = cut.batch, cut.batch + cut.rows
    rows, cols = int(np.prod(w.shape[b:n])), int(np.prod(w.shape[n:]))
    if not 1 <= rank <= min(rows, cols):
        raise ValueError(
            f"{path} is a {rows} x {cols} matrix, so its rank is 1 to "
            f"{min(rows, cols)}, got {rank}."
        )
    # Sums over the rows have the size of what they sum.
    u = jr.normal(key, (*w.shape[:n], rank), w.dtype) / np.sqrt(rows).astype(w.dtype)
    v = jnp.zeros((*w.shape[:b], rank, *w.shape[n:]), w.dtype)
    return Factored(u, v, w.ndim - n)


def merge(params: PyTree) -> PyTree:
    """The weights with what was learned added to them, as dense arrays.

    A compressed base is decoded: to compress the sum is a choice of its own.

    Raises:
        ValueError: no weight is adapted.
    """
    is_adapted = lambda x: isinstance(x, Adapted)
    if not any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted))):
        raise ValueError(
            "none of the weights is adapted: `adapt` them, and train, first."
        )
    one = lambda x: dense(x) if is_adapted(x) else x
    return jax.tree.map(one, params, is_leaf=is_leaf)
