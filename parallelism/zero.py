"""Weights whole on every device, the optimizer's state in parts.

    tx = zero(optax.adamw(1e-3), mesh=mesh)

Each device gets the sum of its part of the gradients, updates its part with its part of
the state, and the updates are gathered: as many bytes as a sum of all gradients, and of
the state one part in `devices`.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 and 5.2 (ZeRO stages 1
and 2, which are one where gradients don't outlive a step).
"""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from jaxeff.tree import pytree, static

from .mesh import axis_size
from .parts import Spec, spec_of, split_once_more


@pytree
class ZeroState:
    """An optimizer's state in parts.

    Attributes:
        state: of the optimizer.
        whole, parts: for each weight, how it lies on the mesh, and how its part does.
    """

    state: PyTree
    whole: tuple[Spec, ...] = static()
    parts: tuple[Spec, ...] = static()


def zero(
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: str = "data",
    least: int = 2**14,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose state, of weights that are whole, is in parts.

    It computes what `tx` computes, whatever that is. What has a weight's path and its
    shape, as a moment has, is in parts, and the rest of a state is whole. Weights that
    are split already, as by `shard`, have their state split once more. For programs of
    the whole mesh, so not inside of `shard_map` (`make_train_step(per_device=...)`).

    Args:
        tx: the optimizer.
        mesh: that the weights are on.
        axis: over whose devices the state is split.
        least: the state of weights with fewer numbers stays whole.

    Raises:
        ValueError: the mesh has no such axis; in `init`, where no state can be split;
            in `update`, for other weights than `init` saw.
    """
    devices = axis_size(mesh, axis)
    inner: Any = optax.with_extra_args_support(tx)

    def on(x: Any, spec: Spec) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def all_on(arrays: PyTree, specs: tuple[Spec, ...]) -> PyTree:
        leaves, structure = jax.tree.flatten(arrays)
        if len(leaves) != len(specs):
            raise ValueError(
                f"the state is that of {len(specs)} weights, but here are "
                f"{len(leaves)}. Make it anew with init."
            )
        return jax.tree.unflatten(structure, map(on, leaves, specs))

    def state_on(state: PyTree, params: PyTree, specs: tuple[Spec, ...]) -> PyTree:
        """Moments lie as the parts of their weights, the rest on every device."""
        weights, _ = jax.tree_util.tree_flatten_with_path(params)
        lies = {
            keys: (w.shape, spec)
            for (keys, w), spec in zip(weights, specs, strict=True)
        }

        # By their paths: where an optimizer is masked, a state has fewer leaves.
        def put(keys: tuple, s: Any) -> Any:
            for i in range(len(keys) + 1):
                shape, spec = lies.get(keys[i:], (None, ()))
                if s.shape == shape:
                    return on(s, spec)
            return on(s, ())

        return jax.tree_util.tree_map_with_path(put, state)

    def init(params: Any) -> Any:
        weights = jax.tree.leaves(params)
        whole = tuple(map(spec_of, weights))
        parts = tuple(split_once_more(w, axis, devices, least) for w in weights)
        if devices > 1 and whole == parts:
            biggest = max(weights, key=lambda w: w.size)
            raise ValueError(
                f"no state can be split among {devices} devices: the largest weight "
                f"has the shape {tuple(biggest.shape)}. Take a number that divides a "
                f"dim of it, or least below {least:,}."
            )
        make = jax.jit(lambda params: state_on(inner.init(params), params, parts))
        return ZeroState(make(params), whole, parts)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        grads = all_on(updates, state.parts)
        own = None if params is None else all_on(params, state.parts)
        updates, new = inner.update(grads, state.state, own, **extra)
        new = state_on(new, grads, state.parts)
        return all_on(updates, state.whole), ZeroState(new, state.whole, state.parts)

    return optax.GradientTransformationExtraArgs(init, update)
