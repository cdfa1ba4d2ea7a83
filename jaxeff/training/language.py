"""What a run on tokens needs from a model: a loss in nats, and the same on unseen text.

A batch is windows of `length + 1` tokens, as `jaxeff.data.windows` gives them: the
model sees all but the last and predicts all but the first.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, Integer, PyTree

from .classifier import TrainFn
from .evaluate import one_behind
from .step import Aux, Loss


def nats(
    logits: Float[Array, "batch length vocab"], tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """Cross-entropy of each token, in float32 whatever the model computes in."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def language_loss(train_fn: TrainFn) -> Loss:
    """Cross-entropy with the next token, averaged over all of the batch, in nats.

    Args:
        train_fn: `train_fn(params, tokens) -> logits, updates`, from `forms`.
    """

    def loss(params: PyTree, batch: Array, key: Array) -> tuple[Array, Aux]:
        logits, updates = train_fn(params, batch[:, :-1])
        return jnp.mean(nats(logits, batch[:, 1:])), Aux(updates=updates)

    return loss


def nats_per_token(
    fn: Callable[..., Array],
    params: PyTree,
    tokens: Integer[np.ndarray, " n"],
    length: int,
    batch_size: int = 64,
    *,
    to: Sharding | jax.Device | None = None,
) -> float:
    """The mean cross-entropy over windows side by side, each token predicted once.

    What does not fill a last window is passed over; a last batch is filled up with
    repeats that do not count. Compiled once for each `fn`.

    Args:
        fn: `fn(params, tokens) -> logits`, hashable.
        params: its parameters.
        tokens: unseen ones, more than `length`.
        length: tokens that the model is given at a time.
        batch_size: windows at a time.
        to: where each batch goes, if not to the default device.

    Raises:
        ValueError: the tokens do not fill one window.
    """
    n = (len(tokens) - 1) // length
    if n < 1 or batch_size < 1:
        raise ValueError(
            f"a window takes length + 1 = {length + 1} tokens and a batch one window, "
            f"but there are {len(tokens)} tokens and batch_size is {batch_size}. "
            "Choose a shorter length or a longer text."
        )

    def sums() -> Iterator[Array]:
        for first in range(0, n, batch_size):
            at = np.arange(first, first + batch_size)
            # Beyond the end: the last window again, with weight 0.
            starts = np.minimum(at, n - 1)[:, None] * length
            batch = tokens[starts + np.arange(length + 1)[None]].astype(np.int32)
            real = (at < n).astype(np.float32)
            yield _sum_nats(fn, params, *jax.device_put((batch, real), to))

    return sum(one_behind(sums())) / (n * length)


@functools.partial(jax.jit, static_argnums=0)
def _sum_nats(
    fn: Callable[..., Array],
    params: PyTree,
    batch: Int[Array, "batch window"],
    real: Float[Array, " batch"],
) -> Float[Array, ""]:
    each = nats(fn(params, batch[:, :-1]), batch[:, 1:])
    return jnp.sum(each * real[:, None])
