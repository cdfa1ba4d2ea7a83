"""What a run on labelled images needs from a Linen model: two functions and a loss.

`forms` gives the model as evaluated and as trained; everything that compresses
takes the first, and `program.like(compressed, train_fn)` makes the second
follow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxeff.data import Batch
from jaxeff.distillation import Answer, Forward

from .step import Aux, Loss

# (variables, inputs) -> (logits, entries of the variables that changed)
TrainFn = Callable[..., tuple[Array, Mapping[str, PyTree]]]
Augment = Callable[[Key[Array, ""], Array], Array]


def forms(model: nn.Module, variables: Mapping[str, Any]) -> tuple[Callable, TrainFn]:
    """`eval_fn(variables, x) -> logits` and `train_fn(...) -> logits, updates`.

    The updates are the entries of `variables` that the model itself changes while
    it trains (`batch_stats`); a model without any is trained as it is evaluated.
    """

    def eval_fn(variables, x):
        return model.apply(variables, x)

    def train_fn(variables, x) -> Any:
        if "batch_stats" not in variables:
            return model.apply(variables, x), {}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    return eval_fn, train_fn


def accuracy_of(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """The fraction of a batch whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def classifier(train_fn: TrainFn, *, augment: Augment | None = None) -> Forward:
    """What a model makes of a batch of images and labels, for a loss.

    Args:
        train_fn: from `forms`, or `program.like(..., train_fn)`.
        augment: changes the images, with the step's key.

    Returns:
        `forward(params, batch, key) -> Answer`: its `loss` is the cross-entropy
        with the labels, averaged over the batch, in nats.
    """

    def forward(params: PyTree, batch: Batch, key: Array) -> Answer:
        images, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
        if augment is not None:
            images = augment(key, images)
        logits, updates = train_fn(params, images)
        # A loss is summed in float32, whatever the model computes in.
        logits = logits.astype(jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        metrics = {"accuracy": accuracy_of(logits, labels)}
        return Answer(logits, (images,), jnp.mean(nats), Aux(metrics, updates))

    return forward


def classification_loss(train_fn: TrainFn, *, augment: Augment | None = None) -> Loss:
    """Cross-entropy with the labels; arguments as for `classifier`."""
    forward = classifier(train_fn, augment=augment)

    def loss(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Aux]:
        answer = forward(params, batch, key)
        return answer.loss, answer.aux

    return loss
