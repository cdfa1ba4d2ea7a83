"""Rotated weights: outliers of activations are spread over all inputs.

For an orthogonal R, `x @ w` is `(x @ R.T) @ (R @ w)`. With R a Hadamard matrix with
random signs no single input of the second product is large, so both of its factors
lose less when they are rounded. R is applied to `x` as it arrives, as a Kronecker
product of small factors (for n inputs with a large odd factor these are not small).

Sources: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), section 4.2, rotated online;
random signs: Chee et al. 2023, arXiv:2307.13304 (QuIP), section 4.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxeff import tree
from jaxeff.program import dense, Dot, is_leaf, keep, Leaf, lift, Site, trace
from jaxeff.tree import pytree, static

_FACTOR = 64  # of a Hadamard matrix: larger ones are products of such
_HIGHEST = jax.lax.Precision.HIGHEST


def factors(n: int) -> list[Float[np.ndarray, "m m"]]:
    """Orthogonal matrices whose Kronecker product has n rows.

    Hadamard matrices for the power of two in n, a cosine transform for the rest.
    """
    power = n & -n
    found = []
    while power > 1:
        m = min(power, _FACTOR)
        h = np.ones((1, 1))
        while len(h) < m:
            h = np.block([[h, h], [h, -h]])
        found.append(h / math.sqrt(m))
        power //= m
    odd = n // (n & -n)
    if odd > 1:
        at = np.arange(odd)
        c = np.cos(np.pi * (2 * at[None] + 1) * at[:, None] / (2 * odd))
        found.append(c * np.sqrt(np.where(at == 0, 1, 2) / odd)[:, None])
    return found


def rotate_dim(
    x: Float[Array, "..."], dim: int, seed: int, *, back: bool = False
) -> Float[Array, "..."]:
    """`x` rotated along a dim; the rotation depends on its length and the seed alone.

    Laws: rotated back it is `x`, and products of two that are rotated alike are those
    of the two, both to rounding.
    """
    dim %= x.ndim
    n = x.shape[dim]
    if n == 0:
        return x
    matrices = factors(n)
    signs = np.random.default_rng([seed, n]).choice([-1.0, 1.0], n)
    signs = signs.reshape([n if d == dim else 1 for d in range(x.ndim)])
    # Rounded once, however many factors there are.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    signs = jnp.asarray(signs, wide)
    y = x.astype(wide) if back else x * signs
    shape = y.shape
    y = y.reshape(*shape[:dim], *map(len, matrices), *shape[dim + 1 :])
    for i, m in enumerate(matrices):
        m = jnp.asarray(m.T if back else m, wide)
        numbers = (((dim + i,), (1,)), ((), ()))
        y = jax.lax.dot_general(y, m, numbers, precision=_HIGHEST)
        y = jnp.moveaxis(y, -1, dim + i)
    y = y.reshape(shape)
    return (y * signs if back else y).astype(x.dtype)


@pytree
class Rotated(Leaf):
    """An array stored as its rotation along the dims that its products sum over.

    Law: `dense()` is `w` rotated back; products are those with it, to rounding.

    Attributes:
        w: rotated, an array or a leaf.
        dims: along which, negative.
        seed: of the rotation.
    """

    w: Any
    dims: tuple[int, ...] = static()
    seed: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""
        return self.w.dtype

    def dense(self) -> Array:
        """The array it stands for."""
        w = dense(self.w)
        for d in self.dims:
            w = rotate_dim(w, d, self.seed, back=True)
        return w

    def _with(self, w: Any, dims: Sequence[int] | None = None) -> Any:
        if w is NotImplemented:
            return w
        return Rotated(w, self.dims if dims is None else tuple(dims), self.seed)

    def astype(self, dtype: Any) -> Any:
        """The same in another floating-point dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return self._with(self.w.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The same weight with its dims in another order."""
        n, order = self.ndim, list(permutation)
        dims = [order.index(d + n) - n for d in self.dims]
        return self._with(self.w.transpose(permutation), dims)

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same weight with other dims split or merged."""
        place = lambda s, d: (math.prod(s[d:]), s[d])
        new = {place(shape, d): d - len(shape) for d in range(len(shape))}
        old = [place(self.shape, d + self.ndim) for d in self.dims]
        if not all(p in new for p in old):
            return NotImplemented
        return self._with(self.w.reshape(shape), [new[p] for p in old])

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without the indices of `dim` where `mask` is False."""
        if dim - self.ndim in self.dims:
            return NotImplemented
        return self._with(keep(self.w, dim, mask))

    def forms(self, x: Array, dot: Dot) -> dict[str, Callable[[], Any]]:
        """Those of what is rotated."""
        x = self._turned(x, dot)
        return self.w.forms(x, dot) if is_leaf(self.w) and x is not None else {}

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())`, as the product of both rotated."""
        x = self._turned(x, dot)
        if x is None:
            return NotImplemented
        return self.w.dot(x, dot) if is_leaf(self.w) else dot(x, self.w)

    def _turned(self, x: Array, dot: Dot) -> Any:
        """What meets the weight, rotated; None if it cannot be."""
        pairs = dict(zip(dot.dims.w_contract, dot.dims.x_contract, strict=True))
        dims = [d + self.ndim for d in self.dims]
        if not jnp.issubdtype(x.dtype, jnp.floating) or not set(dims) <= set(pairs):
            return None
        for d in dims:
            x = rotate_dim(x, pairs[d], self.seed)
        return x


def rotate(
    fn: Callable,
    params: PyTree,
    *args: Any,
    only: tree.Patterns | None = None,
    seed: int = 0,
) -> tuple[Callable, PyTree]:
    """Rotates the inputs of products, so that they can be rounded with less error.

    Do so before `quantize`, `gptq` and the like, which round the rotated weights, and
    the rotated activations where the format says so. It costs a few small products of
    the activations at each weight (at those that read the same inputs once, once
    compiled).

    Args:
        fn: `fn(params, *args)`.
        params: its weights. May be shapes.
        args: example inputs, or their shapes.
        only: patterns of the weights to rotate. By default every weight with which
            nothing is done but products over the same dims.
        seed: of the random signs.

    Returns:
        `lift(fn)` and the new weights, which compute the same, to rounding.

    Raises:
        ValueError: a pattern matches no weight, or none that can be rotated.
    """
    weights = tree.paths(params, is_leaf)
    uses: dict[str, list[Site]] = {path: [] for path in weights}
    for site in trace(lift(fn), params, *args).sites:
        uses.get(site.path, []).append(site)
    reasons = {path: _why_not(x, uses[path]) for path, x in weights.items()}
    patterns = ["**"] if only is None else [only] if isinstance(only, str) else only
    way_out = "Name kernels of products."
    tree.check_some(patterns, reasons, does="rotates", way_out=way_out)
    chosen = tree.match(patterns, weights)

    def rotated(path: str) -> Rotated:
        x, contract = weights[path], sorted(uses[path][0].contract)
        dims = tuple(d - x.ndim for d in contract)

        def turn(w: Array) -> Array:
            for d in dims:
                w = rotate_dim(w, d, seed)
            return w

        shape_only = isinstance(x, jax.ShapeDtypeStruct)
        w = jax.eval_shape(turn, x) if shape_only else jax.jit(turn)(x)
        return Rotated(w, dims, seed)

    new = {path: rotated(path) for path in chosen if not reasons[path]}
    return lift(fn), tree.replaced(params, new, is_leaf)


def _why_not(x: Any, uses: list[Site]) -> str:
    if is_leaf(x):
        return "it is compressed already: rotate first"
    if not tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return "it holds no floating-point numbers"
    if not uses:
        return "no product uses it"
    others = {s.primitive for s in uses} - {"dot_general"}
    if others:
        return f"{', '.join(sorted(others))} uses it"
    if len({tuple(sorted(s.contract)) for s in uses}) > 1:
        return "its products sum over different dims"
    return ""
