"""Attention over sequences that no device holds whole, for use inside of `shard_map`.

Every device of the axis has the same number of positions, in order. Two ways, both
exact:

    ring_attention      keys and values go around the ring, a message to the neighbour
                        while the block at hand is computed; any number of heads
    all_to_all_attention  (Ulysses) swaps positions for heads, attends, and swaps back;
                        fewer bytes, but heads have to divide among the devices

Sources: Liu et al. 2023, arXiv:2310.01889 (ring attention); Dao et al. 2022,
arXiv:2205.14135 (the block's softmax and its gradient); Jacobs et al. 2023,
arXiv:2309.14509 (Ulysses).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that a row whose keys so far are all masked gives no nan.
_NEVER = -1e30


def ring_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t kv d"],
    v: Float[Array, "_ _ _ wide"],
    axis: str,
    *,
    causal: bool = True,
    scale: float | Array | None = None,
) -> Float[Array, "b s h wide"]:
    """Attention of this device's queries to the keys of all devices.

    Memory is that of a few blocks of scores, in the backward too, which computes them
    again. With `causal`, a device has nothing to compute while the keys at hand come
    after its queries; the last device never waits.

    Args:
        q: queries at this device's positions.
        k, v: keys and values there; each head of them serves h / kv heads of queries.
        axis: of the mesh, whose devices share the positions.
        causal: each position attends to itself and to those before it.
        scale: of the scores; d ** -0.5 by default.

    Raises:
        ValueError: the heads of the queries are no multiple of those of the keys, keys
            and values are not of the same positions and heads, or with `causal` not of
            those of the queries.
    """
    b, s, h, d = q.shape
    if h % k.shape[2]:
        raise ValueError(
            f"each head of keys serves as many of queries, but {h} is no multiple of "
            f"{k.shape[2]}."
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"there is a value for each key, but keys have the shape {k.shape} and "
            f"values {v.shape}. Only their last dims may differ."
        )
    if causal and k.shape[1] != s:
        raise ValueError(
            f"with causal a query sees the keys before it, but here are {s} queries "
            f"and {k.shape[1]} keys. Give as many, or causal=False."
        )
    grouped = q.reshape(b, s, k.shape[2], -1, d)
    if scale is None:
        scale = d**-0.5
    elif not isinstance(scale, int | float):
        # A scale that was computed may have a gradient.
        grouped, scale = grouped.astype(jnp.float32) * scale, 1.0
    # With check_vma, JAX wants all that goes around to differ between devices alike.
    each = grouped, k, v, jax.lax.axis_index(axis)
    zeros = (jax.lax.full_like(x, 0, jnp.float32, shape=()) for x in each)
    zero = functools.reduce(jnp.add, zeros)
    grouped, k, v = (x + zero.astype(x.dtype) for x in each[:3])
    out = _ring(grouped, k, v, axis, causal, scale)
    return out.reshape(b, s, h, -1).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _ring(q: Any, k: Any, v: Any, axis: str, causal: bool, scale: float) -> Any:
    return _forward(q, k, v, axis, causal, scale)[0]


def _forward(q: Any, k: Any, v: Any, axis: str, causal: bool, scale: float) -> Any:
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    b, s, kv, g, _ = q.shape
    rows = (b, kv, g, s)

    def attend(of, k, v, state):
        best, total, out = state
        scores = _scores(q, k, me, of, causal, scale)
        new = jnp.maximum(best, scores.max(-1))
        p = jnp.exp(scores - new[..., None])
        shrink = jnp.exp(best - new)
        product = jnp.einsum("bkgqt,btkd->bkgqd", p, v.astype(jnp.float32))
        return (
            new,
            total * shrink + p.sum(-1),
            out * shrink[..., None] + product,
        )

    def turn(t, k, v, state):
        of = (me - t) % n
        return _unless(of > me if causal else None, attend, of, k, v, state)

    def step(t, carry):
        k, v, state = carry
        # On their way while this block is computed.
        coming = _on((k, v), axis, n)
        return *coming, turn(t, k, v, state)

    zero = lambda *shape: jax.lax.full_like(q, 0, jnp.float32, shape=shape)
    # Its own block comes first: there every row has a key, and so a finite maximum.
    state = (zero(*rows) + _NEVER, zero(*rows), zero(*rows, v.shape[-1]))
    k_now, v_now, state = jax.lax.fori_loop(0, n - 1, step, (k, v, state))
    best, total, out = turn(n - 1, k_now, v_now, state)
    out = out / total[..., None]
    result = out.transpose(0, 3, 1, 2, 4).astype(q.dtype)
    return result, (q, k, v, result, best + jnp.log(total))


def _backward(axis: str, causal: bool, scale: float, kept: Any, g: Any) -> Any:
    q, k, v, result, norm = kept
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    g32 = g.astype(jnp.float32)
    # What the softmax takes off each row's gradient.
    inner = (g32 * result.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)

    def give(of, k, v, state):
        dq, dk, dv = state
        p = jnp.exp(_scores(q, k, me, of, causal, scale) - norm[..., None])
        dv += jnp.einsum("bkgqt,bqkgd->btkd", p, g32)
        dp = jnp.einsum("bqkgd,btkd->bkgqt", g32, v.astype(jnp.float32))
        ds = p * (dp - inner[..., None]) * scale
        dq += jnp.einsum("bkgqt,btkd->bqkgd", ds, k.astype(jnp.float32))
        dk += jnp.einsum("bkgqt,bqkgd->btkd", ds, q.astype(jnp.float32))
        return dq, dk, dv

    def turn(t, k, v, state):
        of = (me - t) % n
        dq, dk, dv = _unless(of > me if causal else None, give, of, k, v, state)
        # The gradients go along with their keys, and with the last hop home.
        return dq, *_on((dk, dv), axis, n)

    def step(t, carry):
        k, v, state = carry
        coming = _on((k, v), axis, n)
        return *coming, turn(t, k, v, state)

    zero = lambda x: jax.lax.full_like(x, 0, jnp.float32)
    state = zero(q), zero(k), zero(v)
    k_now, v_now, state = jax.lax.fori_loop(0, n - 1, step, (k, v, state))
    dq, dk, dv = turn(n - 1, k_now, v_now, state)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_ring.defvjp(_forward, _backward)


def _scores(q: Any, k: Any, me: Any, of: Any, causal: bool, scale: float) -> Any:
    """Scores of this device's queries with the keys of device `of`."""
    scores = jnp.einsum("bqkgd,btkd->bkgqt", q, k, preferred_element_type=jnp.float32)
    if not causal:
        return scores * scale
    s = q.shape[1]
    at, to = me * s + jnp.arange(s), of * s + jnp.arange(s)
    seen = (at[:, None] >= to[None, :])[None, None, None]
    return jnp.where(seen, scores * scale, _NEVER)


def _on(tree: Any, axis: str, n: int) -> Any:
    """Everything to the next device of the ring."""
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def _unless(skip: Any, run: Callable, of: Any, k: Any, v: Any, state: Any) -> Any:
    if skip is None:
        return run(of, k, v, state)
    return jax.lax.cond(skip, lambda of, k, v, state: state, run, of, k, v, state)


def all_to_all_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    axis: str,
    *,
    causal: bool = True,
    scale: float | None = None,
    attention: Callable[..., Any] = jax.nn.dot_product_attention,
) -> Float[Array, "b s h d"]:
    """The same, with all positions and a part of the heads on each device in between.

    Args:
        q, k, v, axis, causal, scale: as of `ring_attention`.
        attention: `attention(q, k, v, is_causal=..., scale=...)` on whole sequences.

    Raises:
        ValueError: the heads do not divide among the devices.
    """
    n = jax.lax.axis_size(axis)
    if q.shape[2] % n or k.shape[2] % n:
        raise ValueError(
            f"every device takes as many heads, but {q.shape[2]} heads of queries and "
            f"{k.shape[2]} of keys do not both divide by the {n} devices of {axis}. "
            "Take ring_attention, or fewer devices."
        )
    heads = lambda x: jax.lax.all_to_all(x, axis, 2, 1, tiled=True)
    out = attention(heads(q), heads(k), heads(v), is_causal=causal, scale=scale)
    return jax.lax.all_to_all(out, axis, 1, 2, tiled=True)
