"""Greedy text generation for any causal language model, as pure functions.

They take `fn` and `params` rather than a model, so a compressed model generates
like any other. `greedy` needs nothing but logits and runs the whole sequence anew
for each token; `greedy_cached` runs each token once, for a model with a cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .llama import Cache


def greedy(
    fn: Callable, params: Any, prompt: Int[Array, "b s"], steps: int
) -> Int[Array, "b total"]:
    """The prompt and `steps` more tokens, each the likeliest after those before it.

    Args:
        fn: `fn(params, tokens (b, s)) -> logits (b, s, vocab)`, causal: what comes
            after a position must not change its logits.
        steps: >= 0; static under `jit`.
    """
    _check(prompt, steps)
    first = prompt.shape[1] - 1

    def step(i, tokens):
        # The zeros beyond i are seen by later positions only.
        logits = jax.lax.dynamic_index_in_dim(fn(params, tokens), i, 1, keepdims=False)
        token = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i + 1))

    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))
    return jax.lax.fori_loop(first, first + steps, step, tokens)


def greedy_cached(
    fn: Callable, params: Any, prompt: Int[Array, "b s"], steps: int, cache: Cache
) -> Int[Array, "b total"]:
    """`greedy`, with each token computed once.

    Law: equals `greedy` of the same model.

    Args:
        fn: `fn(params, tokens (b, s), cache) -> (logits (b, s, vocab), cache)`.
        steps: >= 0; static under `jit`.
        cache: empty, with room for the prompt and all new tokens but the last.
    """
    _check(prompt, steps)
    if prompt.shape[0] != cache.k.shape[1]:
        raise ValueError(
            f"a cache has a place for each prompt: there are {prompt.shape[0]}, and it "
            f"was made for {cache.k.shape[1]}. Call init_cache with "
            f"batch={prompt.shape[0]}."
        )
    need, room = prompt.shape[1] + max(steps - 1, 0), cache.k.shape[2]
    if need > room:
        raise ValueError(
            f"{prompt.shape[1]} prompt tokens and {steps} new ones need a cache of "
            f"{need}, got {room}. Call init_cache with length={need} or take fewer "
            f"steps."
        )
    if steps == 0:
        return prompt

    def step(state, _):
        tokens, cache = state
        logits, cache = fn(params, tokens, cache)
        token = jnp.argmax(logits[:, -1], axis=-1).astype(prompt.dtype)[:, None]
        return (token, cache), token[:, 0]

    state, first = step((prompt, cache), None)
    _, rest = jax.lax.scan(step, state, length=steps - 1)
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)


def _check(prompt: Array, steps: int) -> None:
    if prompt.shape[1] < 1 or steps < 0:
        raise ValueError(
            f"Generation needs a prompt of at least one token and steps >= 0, got "
            f"{prompt.shape[1]} and {steps}. Start from the token BOS."
        )
