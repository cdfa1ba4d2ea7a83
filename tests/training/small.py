"""A small run with all that a run can have: batch norm, dropout, Adam, shuffling."""

import functools

import flax.linen as nn
import jax.random as jr
import optax

from jaxeff.data import batches, digits
from jaxeff.training import Aux, init_state, make_train_step


class Net(nn.Module):
    width: int = 12

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(self.width)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


TX = optax.adamw(1e-2)
TRAINABLE = "params/**"


def make_loss(net):
    def loss(params, batch, key):
        logits, updates = net.apply(
            params, batch.images, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), Aux(updates=updates)

    return loss


@functools.cache
def variables(width=12):
    train, _ = digits()
    return Net(width).init(jr.key(0), train.images[:1], train=False)


def small_run(width=12):
    """Everything made anew: the step, its first state, and the batches from a step."""
    train, _ = digits()
    state = init_state(variables(width), TX, jr.key(1), trainable=TRAINABLE)
    step = make_train_step(make_loss(Net(width)), TX, trainable=TRAINABLE)
    # 400 of 1,437: an epoch is 3 steps, so 10 steps shuffle four times.
    return step, state, lambda start: batches(train, 400, seed=7, start_step=start)
