"""A compressed weight: a small pytree that stands where an array stood.

A `Leaf` knows the shape and dtype of the array it stands for, can produce it
(`dense()`), and multiplies without producing it. What it does not know how to
do it declines (`NotImplemented`), and `lift` falls back to `dense()`.

Under `scan` and `vmap` JAX slices the arrays of a leaf along a leading dim,
so nothing static in a leaf may count dims from the front.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Bool, PyTree

from jaxeff.tree import paths


class DotDims(NamedTuple):
    """How a `dot_general` of `x` with a weight pairs their dims."""

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...] = ()
    w_batch: tuple[int, ...] = ()

    def x_free(self, ndim: int) -> tuple[int, ...]:
        """The dims of `x` that reach the output, in order."""
        return _rest(ndim, self.x_contract + self.x_batch)

    def w_free(self, ndim: int) -> tuple[int, ...]:
        """The dims of the weight that reach the output, in order."""
        return _rest(ndim, self.w_contract + self.w_batch)


def _rest(ndim: int, used: Sequence[int]) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d not in used)


@dataclasses.dataclass(frozen=True)
class Dot:
    """One `dot_general` with a weight, to be carried out on other arrays.

    The output's dims are: batch, then the left operand's free dims, then the
    right one's. `weight_first` says which side the weight stood on.
    """

    dims: DotDims
    weight_first: bool
    params: dict[str, Any]  # precision, preferred_element_type

    def __call__(
        self, x: Array, w: Array, dims: DotDims | None = None, **params: Any
    ) -> Array:
        """`x` times `w`, with the weight on the side where it stood."""
        d = self.dims if dims is None else dims
        params = {**self.params, **params}
        if self.weight_first:
            numbers = ((d.w_contract, d.x_contract), (d.w_batch, d.x_batch))
            return jax.lax.dot_general(w, x, numbers, **params)
        numbers = ((d.x_contract, d.w_contract), (d.x_batch, d.w_batch))
        return jax.lax.dot_general(x, w, numbers, **params)

    def output_dims(self, x_ndim: int, w_ndim: int) -> dict[str, tuple[int, ...]]:
        """Where the dims of the output come from: `batch`, `x` and `w`."""
        n = len(self.dims.x_batch)
        n_x, n_w = len(self.dims.x_free(x_ndim)), len(self.dims.w_free(w_ndim))
        first, second = ("w", "x") if self.weight_first else ("x", "w")
        m = n_w if self.weight_first else n_x
        return {
            "batch": tuple(range(n)),
            first: tuple(range(n, n + m)),
            second: tuple(range(n + m, n + n_x + n_w)),
        }


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution with a weight as its kernel, to be run on other arrays."""

    params: dict[str, Any]  # of `conv_general_dilated`

    @property
    def in_dim(self) -> int:
        """The kernel's dim of input channels (per group)."""
        return self.params["dimension_numbers"].rhs_spec[1]

    @property
    def out_dim(self) -> int:
        """The kernel's dim of output channels."""
        return self.params["dimension_numbers"].rhs_spec[0]

    @property
    def spatial_dims(self) -> tuple[int, ...]:
        """The kernel's dims of space."""
        return tuple(self.params["dimension_numbers"].rhs_spec[2:])

    @property
    def x_channel_dim(self) -> int:
        """The input's dim of channels."""
        return self.params["dimension_numbers"].lhs_spec[1]

    @property
    def x_batch_dim(self) -> int:
        """The input's dim of examples."""
        return self.params["dimension_numbers"].lhs_spec[0]

    @property
    def output_batch_dim(self) -> int:
        """The output's dim of examples."""
        return self.params["dimension_numbers"].out_spec[0]

    @property
    def output_channel_dim(self) -> int:
        """The output's dim of channels."""
        return self.params["dimension_numbers"].out_spec[1]

    def __call__(self, x: Array, w: Array, **params: Any) -> Array:
        """The same convolution of `x` with the kernel `w`."""
        return jax.lax.conv_general_dilated_p.bind(x, w, **{**self.params, **params})


def dot_of(eqn: JaxprEqn, weight: int) -> Dot:
    """The product of an equation, seen from the operand that is a weight."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    dims = (
        DotDims(tuple(lc), tuple(rc), tuple(lb), tuple(rb))
        if weight == 1
        else DotDims(tuple(rc), tuple(lc), tuple(rb), tuple(lb))
    )
    keys = ("precision", "preferred_element_type")
    return Dot(dims, weight == 0, {k: eqn.params[k] for k in keys})


def lookup_dim(eqn: JaxprEqn) -> int | None:
    """The dim along which a gather looks whole rows up, if that is what it does."""
    numbers = eqn.params["dimension_numbers"]
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    collapsed = tuple(numbers.collapsed_slice_dims)
    if len(collapsed) != 1 or tuple(numbers.start_index_map) != collapsed:
        return None
    if numbers.operand_batching_dims:
        return None
    rest = [d for d in range(len(shape)) if d != collapsed[0]]
    return collapsed[0] if all(sizes[d] == shape[d] for d in rest) else None


class Leaf(abc.ABC):
    """A compressed weight. Subclasses are made with `jaxeff.tree.pytree`.

    Laws: `dense()` has `shape` and `dtype`; every operation below, where it is
    not declined, equals the same operation on `dense()` up to the rounding that
    the leaf's own format documents.
    """

    kinds: ClassVar[dict[str, type["Leaf"]]] = {}  # by name, as checkpoints name them

    def __init_subclass__(cls) -> None:
        """Makes the kind known by its name."""
        Leaf.kinds[f"{cls.__module__}.{cls.__name__}"] = cls

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype of the array it stands for."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """The array it stands for."""

    def __jax_array__(self) -> Array:
        """Refuses to be an array unasked, so that nothing decodes it unseen.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a compressed weight ({type(self).__name__}) was given to a function that "
            "knows arrays alone. Call the function that came with it, or `lift(fn)`; "
            "`dense` makes arrays of all."
        )

    @property
    def packed_sizes(self) -> dict[str, int]:
        """How many numbers those fields hold that store several in one element."""
        return {}

    @property
    def ndim(self) -> int:
        """Number of dims of the array it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the array it stands for."""
        return int(np.prod(self.shape))

    def astype(self, dtype: Any) -> Any:
        """The same weight in another floating-point dtype."""
        return NotImplemented

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """The same weight with its dims in another order."""
        return NotImplemented

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """The same weight with dims split or merged."""
        return NotImplemented

    def dot(self, x: Array, dot: Dot) -> Any:
        """`dot(x, self.dense())`."""
        return NotImplemented

    def forms(self, x: Array, dot: Dot) -> dict[str, Callable[[], Any]]:
        """Other ways to compute what `dot` does, by name, that may be faster.

        Law: each equals `dot` up to the rounding of floating-point sums.
        """
        return {}

    def conv(self, x: Array, conv: Conv) -> Any:
        """`conv(x, self.dense())`."""
        return NotImplemented

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        """Looks rows up along `dim`; `gather` does so on an array of equal rank.

        `gather` accepts an array whose `dim` is as long as the leaf's and whose
        other dims have any length; its other dims come out after the indices'.
        """
        return NotImplemented

    def keep(self, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
        """The weight without the indices of `dim` where `mask` is False."""
        return NotImplemented


def take_places(
    gather: Callable[[Array], Array], shape: Sequence[int], dim: int
) -> dict[int, int]:
    """Where the `gather` of `Leaf.take` puts each other dim of an array of `shape`."""
    others = [d for d in range(len(shape)) if d != dim]

    def result(n: int) -> tuple[int, ...]:
        sizes = [shape[d] if d == dim else n for d in range(len(shape))]
        return jax.eval_shape(gather, jax.ShapeDtypeStruct(sizes, jnp.float32)).shape

    pairs = enumerate(zip(result(1), result(2), strict=True))
    vary = [i for i, (n, m) in pairs if n != m]
    return dict(zip(others, vary, strict=True))


def is_leaf(x: Any) -> bool:
    """Whether `x` is a compressed weight: for `jax.tree.map(..., is_leaf=is_leaf)`."""
    return isinstance(x, Leaf)


def packed(params: PyTree) -> dict[str, int]:
    """`Leaf.packed_sizes` of every leaf in a tree, by the path of the array."""
    found = {}
    for path, x in paths(params, is_leaf).items():
        if is_leaf(x):
            parts = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
            inside = packed({name: y for name, y in parts.items() if is_leaf(y)})
            for name, n in (x.packed_sizes | inside).items():
                found[f"{path}/{name}".lstrip("/")] = n  # a leaf alone has no path
    return found


def is_real(dtype: Any) -> bool:
    """Whether numbers of a dtype can be multiplied with little rounding.

    Not integers, and not the floats of 8 bits that codes and scales are stored as.
    """
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def coded(params: PyTree) -> dict[str, str]:
    """The arrays of leaves that hold codes: by the path of each, that of its leaf."""
    found = {}
    for path, x in paths(params, is_leaf).items():
        parts = paths(x) if is_leaf(x) else {}
        if not all(is_real(part.dtype) for part in parts.values()):
            found.update({f"{path}/{name}".lstrip("/"): path for name in parts})
    return found


def dense(tree: PyTree) -> PyTree:
    """The tree with every compressed weight as the array it stands for."""

    def expand(x):
        if not is_leaf(x):
            return x
        # A leaf may be made of leaves: factors that are quantized.
        parts = jax.tree.map(dense, x, is_leaf=lambda y: is_leaf(y) and y is not x)
        return parts.dense()

    return jax.tree.map(expand, tree, is_leaf=is_leaf)


def relative_error(w: Any, new: Any) -> float | None:
    """How far a compressed weight is from the weight it was made of.

    Returns:
        The root of the summed squared differences over that of the summed squared
        weights; None where only a shape is known.
    """
    if isinstance(w, jax.ShapeDtypeStruct):
        return None
    w, new = (dense(x).astype(jnp.float32).ravel() for x in (w, new))
    norm = jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)
    return float(jnp.linalg.norm(new - w) / norm)


def keep(x: Any, dim: int, mask: Bool[np.ndarray, " n"]) -> Any:
    """An array, its shape, or a leaf without the indices of `dim` that are False.

    Raises:
        ValueError: a leaf cannot lose indices of that dim.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (*x.shape[:dim], int(mask.sum()), *x.shape[dim + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)
    if is_leaf(x):
        small = x.keep(dim, mask)
        if small is NotImplemented:
            raise ValueError(
                f"a compressed weight ({type(x).__name__} of shape {x.shape}) cannot "
                f"lose indices of dim {dim}: shrink before compressing it."
            )
        return small
    return x[(slice(None),) * dim + (np.flatnonzero(mask),)]


def shapes(tree: PyTree) -> PyTree:
    """The tree with every weight, compressed or not, as its dense shape and dtype.

    What is not an array stays.
    """

    def shape(x):
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            # NumPy's float64 is float32 to JAX, unless told otherwise.
            plain = isinstance(x.dtype, np.dtype)
            dtype = jax.dtypes.canonicalize_dtype(x.dtype) if plain else x.dtype
            weak = getattr(x, "weak_type", False) if not is_leaf(x) else False
            return jax.ShapeDtypeStruct(tuple(x.shape), dtype, weak_type=weak)
        return x

    return jax.tree.map(shape, tree, is_leaf=is_leaf)


def dense_size(tree: PyTree) -> int:
    """Number of weights the tree stands for, compressed or not."""
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    return sum(
        int(np.prod(jnp.shape(x) if not is_leaf(x) else x.shape)) for x in leaves
    )
