"""Fully sharded data parallelism: each device keeps a part of every weight.

    fn, params = fully_shard(fn, params, x, mesh=make_mesh(fsdp=8))

A weight is gathered where it is used, layer by layer inside of a scan, and again in the
backward pass; its gradient comes out summed and in parts, as the weight is. So are an
optimizer's moments, which are made like the weights. Left to itself the compiler would
often move activations instead, as weights in parts look like tensor parallelism.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3 (ZeRO stage 3).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from jaxeff import tree
from jaxeff.program import Conv, dense, Dot, is_leaf, Leaf, lift, Rewritten, trace
from jaxeff.tree import pytree, static

from .grouped import check_grouped, copying_axes, grouped_weights
from .mesh import axis_size
from .parts import axes_of, put, Spec, spec_of, split_once_more


@pytree
class _InParts(Leaf):
    """A weight in parts, for as long as a function runs; it may be compressed.

    Attributes:
        arrays: those that the weight is made of.
        structure: how. (Not the weight itself: what a leaf of leaves does with them is
            run on dense arrays.)
        mesh: over which they are in parts.
        stored, used: how each array lies there before and after it is gathered, its
            dims counted from the last: a scan takes slices of the first.
    """

    arrays: tuple[Any, ...]
    structure: Any = static()
    mesh: Mesh = static()
    stored: tuple[Spec, ...] = static()
    used: tuple[Spec, ...] = static()

    @property
    def weight(self) -> Any:
        """As it is stored."""
        return jax.tree.unflatten(self.structure, self.arrays)

    @property
    def compressed(self) -> bool:
        """Whether the weight is no array."""
        return is_leaf(self.weight)

    def with_weight(self, weight: Any) -> Any:
        """Another one, of the same arrays, that is stored and used like this."""
        if weight is NotImplemented:
            return weight
        arrays, structure = jax.tree.flatten(weight)
        return dataclasses.replace(self, arrays=tuple(arrays), structure=structure)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def whole(self) -> Any:
        """The weight, gathered."""

        def gather(array: Array, stored: Spec, used: Spec) -> Array:
            n = array.ndim
            on = lambda spec: NamedSharding(self.mesh, P(*spec[len(spec) - n :]))
            # The first does nothing to the weight: it is for the gradient, which comes
            # back through both and has to end in parts too.
            parts = jax.lax.with_sharding_constraint(array, on(stored))
            return jax.lax.with_sharding_constraint(parts, on(used))

        found = map(gather, self.arrays, self.stored, self.used)
        return jax.tree.unflatten(self.structure, found)

    def dense(self) -> Array:
        return dense(self.whole())

    def astype(self, dtype: Any) -> Any:
        return self.with_weight(self.weight.astype(dtype))

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        if self.compressed:
            return self.whole().transpose(permutation)
        n = len(permutation)
        turned = lambda spec: tuple(spec[len(spec) - n :][d] for d in permutation)
        turn = lambda specs: tuple(map(turned, specs))
        new = self.with_weight(self.weight.transpose(permutation))
        return dataclasses.replace(new, stored=turn(self.stored), used=turn(self.used))

    def reshape(self, shape: tuple[int, ...]) -> Any:
        return self.whole().reshape(shape) if self.compressed else NotImplemented

    def dot(self, x: Array, dot: Dot) -> Any:
        return self._again(lambda w, x: w.dot(x, dot), dot, x)

    def conv(self, x: Array, conv: Conv) -> Any:
        return self._again(lambda w, x: w.conv(x, conv), conv, x)

    def take(self, gather: Callable[[Array], Array], dim: int) -> Any:
        return self.whole().take(gather, dim) if self.compressed else NotImplemented

    def _again(self, compressed: Callable, plain: Callable, x: Array) -> Any:
        """An operation that keeps the part for its backward, and gathers it again."""
        if self.compressed:
            return compressed(self.whole(), x)
        run = lambda x, w: plain(x, w.whole())
        # Of a slice, forward and backward are loops of their own. Elsewhere the
        # compiler would keep what was gathered first, to save the second time.
        sliced = self.ndim < len(self.stored[0])
        return jax.checkpoint(run, prevent_cse=not sliced)(x, self)


@dataclasses.dataclass(frozen=True, eq=False)  # `jit` wants a hash
class FullySharded(Rewritten):
    """A function of weights that are gathered as they are used; see `fully_shard`.

    Attributes:
        mesh: over which they are in parts.
        specs: by path, how those that are in parts lie there: stored, and used, for
            each array of a weight.
    """

    mesh: Mesh
    specs: Mapping[str, tuple[tuple[Spec, ...], tuple[Spec, ...]]]

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The function of the whole weights."""
        weights = tree.paths(params, is_leaf)
        new = {}
        for path, (stored, used) in self.specs.items():
            arrays, structure = jax.tree.flatten(weights[path])
            new[path] = _InParts(tuple(arrays), structure, self.mesh, stored, used)
        whole = tree.replaced(params, new, is_leaf)
        return lift(self.fn)(whole, *args, **kwargs)


def fully_shard(
    fn: Callable,
    params: Any,
    *args: Any,
    mesh: Mesh,
    axis: str = "fsdp",
    least: int = 2**14,
    whole: tree.Patterns = (),
    **kwargs: Any,
) -> tuple[Callable, Any]:
    """The function, and its weights in parts on the devices of the axis `fsdp`.

    Use it under `jit`, with the batch shared over `fsdp` as over `data`. Weights that
    are split already, as by `shard`, stay so, and are split once more.

    Each device sends and receives the bytes of the weights three times in a step of
    training: gathered for the forward and for the backward, and their gradients summed.
    That is for each use. Where all turns of a loop use one weight, as in an RNN, it is
    gathered once for the forward and in each turn of the backward: leave it `whole`.

    Args:
        fn: any function that JAX can trace.
        params: its weights, arrays or shapes. Of compressed ones each array is split.
        args, kwargs: the rest, as it will be called with, arrays or shapes.
        mesh: with that axis. Of size 1 it splits nothing.
        axis: of the mesh.
        least: weights with fewer numbers stay whole; of stacked layers, in each.
        whole: patterns of weights that stay whole.

    Raises:
        ValueError: the mesh has no such axis, no weight can be split among so many
            devices, or a pattern matches no weight; or XLA would get the gradient of a
            grouped convolution wrong, see `grouped.py`.
    """
    devices = axis_size(mesh, axis)
    weights = tree.paths(params, is_leaf)
    kept = set(tree.match(whole, weights)) if whole else set()
    scanned = {}
    if devices > 1 or copying_axes(mesh):
        program = trace(fn, params, *args, **kwargs)
        scanned = program.scanned
        of = tree.paths(params)  # each array of a compressed one
        over = lambda path: axes_of(of[path])
        check_grouped(grouped_weights(program), mesh, split=over)

    def stored(path: str, w: Any) -> Spec:
        """How an array is to be stored."""
        dims = [d for d in range(w.ndim) if d not in scanned.get(path, ())]
        return split_once_more(w, axis, devices, least, dims)

    specs, placed = {}, {}
    for path, weight in weights.items():
        arrays, structure = jax.tree.flatten(weight)
        inside = [f"{path}/{n}".rstrip("/") for n in tree.paths(weight)]
        before = tuple(map(spec_of, arrays))
        after = before if path in kept else tuple(map(stored, inside, arrays))
        if after != before:
            specs[path] = after, before
        on = [NamedSharding(mesh, P(*spec)) for spec in after]
        placed[path] = jax.tree.unflatten(structure, map(put, arrays, on))
    if devices > 1 and not specs:
        path, biggest = max(weights.items(), key=lambda item: item[1].size)
        raise ValueError(
            f"no weight can be split among {devices} devices: the largest, {path}, has "
            f"the shape {tuple(biggest.shape)}. Take a number that divides a dim of "
            f"it, or least below {least:,}."
        )
    gathered = FullySharded(fn, mesh, specs) if specs else fn
    return gathered, tree.replaced(params, placed, is_leaf)
