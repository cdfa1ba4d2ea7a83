"""Training with rounding in the loop, its steps learned (LSQ).

`fake_quantize` puts into the tree weights that are rounded each time they are used,
and whose derivative is that of the unrounded ones within the grid's range. They are
plain floating-point arrays, as are the scales: both train with any optimizer.
`convert` stores what training saw in few bits.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import Conv, Dot, is_leaf, Leaf, lift
from jaxeff.tree import pytree, static

from . import blocks, scales as scaling
from .arrays import QArray, store
from .choice import AnyFormat
from .formats import Format, product_name
from .grids import Grid, named
from .quantize import apply, check_finite, check_formats, choose, Formats
from .ranges import activation_scales
from .scales import Scales


@pytree
class FakeQuantized(Leaf):
    """A weight that is rounded whenever it is used.

    Laws: `dense()` is on the grid, and is what `convert` stores; where a weight lies
    within the grid's range its derivative is that of the array itself, elsewhere 0;
    that of a scale is what rounding did to the weights it scales (LSQ, equation 3).

    Attributes:
        w: the weight, not rounded; it keeps its dtype where the function casts it.
        scale: of its blocks, as in `QArray`; float32, trained.
        x_scale: of activations, trained; None: they are not rounded, or with a scale
            found as they arrive.
        packed: the dim that codes will lie along, negative.
        dtype_name: of what `dense()` returns; None: that of `w`.
    """

    w: Float[Array, "..."]
    scale: Float[Array, "..."]
    x_scale: Float[Array, "..."] | None = None
    grid: str = static(default="int8")
    activations: str | None = static(default=None)
    packed: int | None = static(default=None)
    dtype_name: str | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """Of the weight."""
        return jnp.dtype(self.dtype_name or self.w.dtype)

    @property
    def format(self) -> str:
        """What it is trained for, `int4` or `w4a8`."""
        static = self.x_scale is not None
        return product_name(named(self.grid), self.activations, static=static)

    def dense(self) -> Array:
        """The weight, rounded."""
        blocks_of = self.w.size / max(1, self.scale.size)
        near = rounded(self.w, self.scale, named(self.grid), blocks_of)
        return near.astype(self.dtype)

    def astype(self, dtype: Any) -> Any:
        """The same in another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        # Rounded first and cast then, as what `convert` stores is.
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def _changed(self, change: Callable[[Array, bool], Array]) -> "FakeQuantized":
        x_scale = None if self.x_scale is None else change(self.x_scale, False)
        w, scale = change(self.w, True), change(self.scale, False)
        return dataclasses.replace(self, w=w, scale=scale, x_scale=x_scale)

    def transpose(self, permutation: Sequence[int]) -> "FakeQuantized":
        """The same weight with its dims in another order."""
        return self._changed(lambda x, _: x.transpose(permutation))

    def reshape(self, shape: Sequence[int]) -> "FakeQuantized":
        """The same weight with dims split or merged."""
        beside = lambda x: blocks.reshape(x, self.shape, tuple(shape))
        return self._changed(lambda x, w: x.reshape(shape) if w else beside(x))

    def keep(self, dim: int, mask: Any) -> "FakeQuantized":
        """The weight without the indices of `dim` where `mask` is False."""
        return self._changed(
            lambda x, w: jnp.compress(mask, x, dim) if w else blocks.keep(x, dim, mask)
        )

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())`, `x` rounded first where the format says so."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented
        pairs = dict(zip(dot.dims.w_batch, dot.dims.x_batch, strict=True))
        # As many scales along a dim that is summed as the weight has.
        among = zip(dot.dims.x_contract, dot.dims.w_contract, strict=True)
        sizes = {d: x.shape[d] // self.scale.shape[w] for d, w in among}
        x = self._input(x, sizes, pairs)
        return dot(x, self.dense().astype(jnp.promote_types(x.dtype, self.dtype)))

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())`, `x` rounded first where the format says so."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented
        sizes = {d: n for d, n in enumerate(x.shape) if d != conv.x_batch_dim}
        x = self._input(x, sizes, {})
        return conv(x, self.dense().astype(jnp.promote_types(x.dtype, self.dtype)))

    def _input(self, x: Array, sizes: dict[int, int], pairs: dict[int, int]) -> Array:
        """`x` rounded, with its dtype.

        Args:
            x: what meets the weight.
            sizes: for each dim that is summed how many neighbours share a scale.
            pairs: batch dims of the weight, and which of `x` they are.
        """
        if self.activations is None:
            return x
        grid = named(self.activations)
        if self.x_scale is None:
            shared = [sizes.get(d, 1) for d in range(x.ndim)]
            top = jax.lax.stop_gradient(blocks.absmax(x, shared))
            scale = scaling.step(top, grid.largest)
        else:
            scale = blocks.at_batch(self.x_scale, pairs, x.ndim)
        # Features of one example, however many there are.
        per_scale = math.prod(x.shape[d] for d in sizes)
        return rounded(x, scale, grid, per_scale).astype(x.dtype)


def rounded(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    grid: Grid,
    per_scale: int | float,
) -> Float[Array, "..."]:
    """The nearest numbers of the grid times `scale`, with LSQ's derivatives.

    Args:
        x: weights or activations.
        scale: of their blocks; positive.
        grid: the numbers.
        per_scale: how many of `x` a scale is for, by whose root its derivative is
            divided, so that steps of scales and of weights have like sizes (section
            2.2).
    """
    slow = 1 / (per_scale * grid.largest) ** 0.5
    fixed = jax.lax.stop_gradient(positive(scale))
    scale = fixed + slow * (positive(scale) - fixed)  # its value bit for bit
    scale = blocks.broadcastable(scale, x.shape)
    x = x.astype(jnp.float32) / scale
    inside = jnp.clip(x, grid.levels[0], grid.levels[-1])
    near = jax.lax.stop_gradient(grid.nearest(x))
    # The value is `near` bit for bit; the derivative that of `inside`.
    return (near + (inside - jax.lax.stop_gradient(inside))) * scale


def positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """A scale that training may have driven through zero, as it is used."""
    return jnp.maximum(jnp.abs(scale), jnp.finfo(jnp.float32).tiny)


def fake_quantize(
    fn: Callable,
    params: PyTree,
    *args: Any,
    formats: Formats | None = None,
    fit: str = "mse",
    batches: Iterable[tuple] | None = None,
) -> tuple[Callable, PyTree]:
    """The function with weights that are rounded as they are used, to be trained.

    Args:
        fn, params, args, formats, batches: as for `quantize`. Activations with a range
            have scales that train, beginning from it.
        fit: "absmax" or "mse": how the scales to begin from are found.

    Returns:
        `lift(fn)`, and the weights. `convert` makes of them what `quantize` returns.

    Raises:
        ValueError: as `quantize`; or a format has a zero point, codebooks, or scales
            that are not float32.
    """
    check_formats(formats)
    choices = choose(fn, params, args, formats)
    for c in choices:
        fmt = c.format
        if fmt is not None and not _trains(fmt):
            raise ValueError(
                f"{c.path} is to be {fmt.name}, but scales are trained where they are "
                "float32 and nothing is beside them. Choose a symmetric format such "
                "as `int4`."
            )
    x_scales = activation_scales(fn, params, batches, choices)
    new = apply(params, choices, fit=fit, x_scales=x_scales)
    trained = lambda q, w: (
        FakeQuantized(
            w=w,
            scale=q.scale,
            x_scale=q.x_scale,
            grid=q.grid,
            activations=q.activations,
            packed=q.packed,
        )
        if isinstance(q, QArray) and not isinstance(w, QArray)
        else q
    )
    return lift(fn), jax.tree.map(
        trained, new, params, is_leaf=lambda x: isinstance(x, QArray)
    )


def _trains(format: AnyFormat) -> bool:
    if not isinstance(format, Format):
        return False
    return format.scale == "float32" and not format.grid.has_zero_point


def convert(params: PyTree) -> PyTree:
    """The weights that training saw, in few bits.

    Law: `lift(fn)` of them computes what it computed with those trained, to float32
    rounding: each weight is the same number.

    Args:
        params: with leaves of `fake_quantize`; others stay.

    Raises:
        ValueError: there is none, or training made a number of one NaN.
    """
    found = 0

    def stored(path: Any, x: Any) -> Any:
        nonlocal found
        if not isinstance(x, FakeQuantized):
            return x
        found += 1
        for array in (x.w, x.scale, x.x_scale):
            if array is not None:
                check_finite(tree.path_name(path), array)
        format = Format(named(x.grid), activations=x.activations)
        along = None if x.packed is None else x.packed + x.ndim
        others = [d for d in range(x.ndim) if d != along]
        x_scale = None if x.x_scale is None else positive(x.x_scale)
        return store(x.w, format, Scales(positive(x.scale)), others, x_scale)

    new = jax.tree_util.tree_map_with_path(stored, params, is_leaf=is_leaf)
    if not found:
        raise ValueError(
            "none of the weights is trained to be rounded: make them so with "
            "`fake_quantize`, and train them, first."
        )
    return new
