"""Devices that train apart and meet now and then: local SGD, DiLoCo, streaming DiLoCo.

    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    tx = diloco(optax.adamw(1e-3), outer, every=50, devices=8)
    step = make_train_step(loss, tx, per_device=mesh, view=local_weights)

The params of the run are what all devices agreed on when they met last. How far each
has moved away since, its drift, is in the state, and `local_weights` adds it for the
loss. At a meeting the mean of the drifts goes to the outer optimizer as a gradient, and
all start anew from what it makes of the params. In between nothing of the weights is
sent: a step sends an `every`-th of what data parallelism does.

With `optax.sgd(1.0)` outside it is local SGD: the mean of the weights. Parts of the
model may meet at different times, so that never all of it is sent at once.

Sources: Stich 2019, arXiv:1805.09767 (local SGD); Douillard et al. 2023,
arXiv:2311.08105 (DiLoCo); Douillard et al. 2025, arXiv:2501.18512, section 2.1 (parts).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from .compression import Compression
from .per_device import check_axis, check_devices, PerDevice


class _Apart(NamedTuple):
    """Of the inner optimizer and the drifts: each device its own; of the outer: one."""

    step: Int[Array, ""]
    inner: PerDevice
    drift: PerDevice
    outer: tuple[Any, ...]  # a state for each part


def diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    every: int,
    devices: int,
    parts: int = 1,
    axis: str = "data",
) -> Compression:
    """An optimizer of each device by itself, and one of their mean.

    Args:
        inner: of each device, on its own gradients and weights.
        outer: of the params; its gradient is minus the mean of the drifts. DiLoCo's is
            `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
        every: steps between two meetings of a part, >= 1.
        devices: of the axis.
        parts: of the model, nearly equal in size, that meet in turn, `every / parts`
            steps after one another; the last of them after `every` steps.
        axis: whose devices train apart.

    Returns:
        An optax transform for a step with `per_device` and `view=local_weights`.
        `sent(params)` is the mean over the steps.

    Raises:
        ValueError: a count below 1, or more parts than steps between two meetings, or
            (in `init`) than weights.
    """
    check_devices(devices)
    if not 1 <= parts <= every or not isinstance(every, int):
        raise ValueError(
            f"parts of the model meet one after another within a whole number of "
            f"steps, so 1 <= parts <= every, got parts={parts} and every={every}."
        )
    meets_at = [every * (part + 1) // parts % every for part in range(parts)]

    def init(params):
        leaves = jax.tree.leaves(params)
        own = lambda tree: PerDevice(
            jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), tree)
        )
        groups = _parts([x.size for x in leaves], parts)
        return _Apart(
            jnp.zeros([], jnp.int32),
            own(inner.init(params)),
            own(jax.tree.map(jnp.zeros_like, params)),
            tuple(outer.init([leaves[i] for i in of]) for of in groups),
        )

    def update(grads, state, params=None):
        check_axis(axis, devices)
        if params is None:
            raise ValueError("devices move away from the params: update needs them.")
        mine = lambda own: jax.tree.map(lambda a: a[0], own.values)
        drift, kept = mine(state.drift), mine(state.inner)
        here = jax.tree.map(jnp.add, params, drift)
        moves, kept = inner.update(grads, kept, here)
        drift = jax.tree.map(lambda d, m: d + m.astype(d.dtype), drift, moves)
        step = state.step + 1

        away, structure = jax.tree.flatten(drift)
        agreed, out, outers = jax.tree.leaves(params), list(away), []
        for at, of, old in zip(
            meets_at, _parts([x.size for x in away], parts), state.outer, strict=True
        ):
            values = [away[i] for i in of], [agreed[i] for i in of], old
            moved, left, new = jax.lax.cond(
                step % every == at, meet, lambda d, p, o: (_zeros(d), d, o), *values
            )
            outers.append(new)
            for i, m, d in zip(of, moved, left, strict=True):
                out[i], away[i] = m, d
        own = lambda tree: PerDevice(jax.tree.map(lambda a: a[None], tree))
        drift = jax.tree.unflatten(structure, away)
        state = _Apart(step, own(kept), own(drift), tuple(outers))
        return jax.tree.unflatten(structure, out), state

    def meet(drift, params, state):
        mean = jax.lax.pmean(drift, axis)
        moved, state = outer.update([-d for d in mean], state, params)
        moved = jax.tree.map(lambda m, d: m.astype(d.dtype), moved, drift)
        return moved, _zeros(drift), state

    def sent(params):
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return 2 * (devices - 1) / devices * total / every

    return Compression(init, update, sent)


def local_weights(params: PyTree, opt_state: PyTree) -> PyTree:
    """The weights of this device, for `view` of a training step with `diloco`.

    Raises:
        ValueError: the optimizer is another.
    """
    ours = lambda x: isinstance(x, _Apart)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=ours) if ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"local_weights shows what one diloco in the optimizer keeps, but it has "
            f"{len(found)}. Use it with diloco alone."
        )
    return jax.tree.map(lambda p, d: p + d[0], params, found[0].drift.values)


def drifts(opt_state: PyTree) -> bool:
    """Whether a diloco in an optimizer keeps how far each device has moved."""
    ours = lambda x: isinstance(x, _Apart)
    return any(map(ours, jax.tree.leaves(opt_state, is_leaf=ours)))


def _parts(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Which arrays are in which part: neighbours apart, the largest first."""
    if parts > len(sizes):
        raise ValueError(
            f"a part holds a weight at least, but there are {len(sizes)} for "
            f"parts={parts}."
        )
    groups: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for i in np.argsort([-n for n in sizes], kind="stable"):
        least = min(range(parts), key=lambda part: (held[part], len(groups[part])))
        groups[least].append(int(i))
        held[least] += sizes[i]
    return [sorted(of) for of in groups]


def _zeros(arrays: list[Array]) -> list[Array]:
    return [jnp.zeros_like(x) for x in arrays]
