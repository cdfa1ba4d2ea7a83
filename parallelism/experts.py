"""Mixtures of experts whose experts are on different devices, for use in `shard_map`.

Every device of the axis has its own tokens and its own experts. Each token goes to the
k experts that its router prefers: an all-to-all takes tokens to their experts, another
takes the results back. An expert takes so many tokens from each device and no more, so
that all messages have one shape; a token that finds no room is left out there, and its
result has that much less.

Sources: Lepikhin et al. 2020, arXiv:2006.16668, section 3.2 (capacity, first choices
first); Fedus et al. 2021, arXiv:2101.03961, section 2.2 (load balancing).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Mixed(NamedTuple):
    """What a mixture of experts gives.

    Attributes:
        y: for each token, the results of its experts, each times its gate.
        balance: the loss that evens out who gets how many tokens, over all devices: 1
            where all get the same, and experts / k where the same k get all.
        dropped: fraction of (token, expert) pairs that found no room, over all devices.
    """

    y: Float[Array, "t d"]
    balance: Float[Array, ""]
    dropped: Float[Array, ""]


def mixture_of_experts(
    expert: Callable[[PyTree, Array], Array],
    weights: PyTree,
    x: Float[Array, "t d"],
    logits: Float[Array, "_ experts"],
    axis: str | None = None,
    *,
    k: int = 2,
    capacity: float = 1.25,
) -> Mixed:
    """Sends each token to k experts, and adds up what they make of it.

    Args:
        expert: `expert(weights of one, tokens (n, d)) -> (n, d)`.
        weights: a pytree of arrays (experts of this device, ...).
        x: this device's tokens.
        logits: of the router, for all experts of all devices, in order of the device.
        axis: of the mesh, whose devices share the experts; None where one has all.
        k: experts of each token. Their gates are softmaxed logits, and for k > 1 made
            to sum to 1.
        capacity: room of an expert for tokens of each device, in multiples of what it
            gets when all get the same.

    Raises:
        ValueError: there is no token, or not a row of logits for each; the experts do
            not divide among the devices, or weights are for another number of them; k
            or capacity is out of range.
    """
    n = 1 if axis is None else jax.lax.axis_size(axis)
    tokens, experts = logits.shape
    if not 1 <= tokens == x.shape[0]:
        raise ValueError(
            f"each of 1 token or more has its row of logits, but there are "
            f"{x.shape[0]} tokens and {tokens} rows. Give one for each."
        )
    held = {a.shape[0] for a in jax.tree.leaves(weights)}
    if experts % n or held != {experts // n}:
        raise ValueError(
            f"the router knows {experts} experts, shared by {n} devices, so weights "
            f"are for {experts / n:g} on each, but they are for {sorted(held)}."
        )
    if not 1 <= k <= experts or not 0 < capacity < math.inf:
        raise ValueError(
            f"a token goes to 1 to {experts} experts, with a finite capacity above 0, "
            f"got k={k} and capacity={capacity}."
        )
    room = min(tokens, max(1, math.ceil(capacity * k * tokens / experts)))
    chances = jax.nn.softmax(logits.astype(jnp.float32))
    gates, chosen = jax.lax.top_k(chances, k)
    # One gate alone would be 1 whatever the router says, and the router learn nothing.
    gates = gates / gates.sum(-1, keepdims=True) if k > 1 else gates
    # First choices of all tokens first: they find room before any second choice.
    order = chosen.T.reshape(-1)
    hot = jax.nn.one_hot(order, experts, dtype=jnp.int32)
    before = (jnp.cumsum(hot, 0) - hot)[jnp.arange(k * tokens), order]
    fits = before < room
    place = jnp.where(fits, order * room + before, experts * room)

    slots = jnp.zeros((experts * room, x.shape[1]), x.dtype)
    slots = slots.at[place].set(jnp.tile(x, (k, 1)), mode="drop")
    there = _swap(slots.reshape(n, experts // n, room, -1), axis)
    # (from which device, expert, room, d) -> (expert, all its tokens, d)
    there = there.swapaxes(0, 1).reshape(experts // n, n * room, -1)
    made = jax.vmap(expert)(weights, there)
    back = made.reshape(experts // n, n, room, -1).swapaxes(0, 1)
    back = _swap(back, axis).reshape(experts * room, -1)
    each = back.at[place].get(mode="fill", fill_value=0).reshape(k, tokens, -1)
    y = (each * gates.T[..., None].astype(each.dtype)).sum(0)

    mean = lambda a: a if axis is None else jax.lax.pmean(a, axis)
    share = mean(hot.sum(0) / (k * tokens))
    balance = experts * (share * mean(chances.mean(0))).sum()
    return Mixed(y, balance, mean(1 - fits.mean()))


def _swap(x: Array, axis: str | None) -> Array:
    return x if axis is None else jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
