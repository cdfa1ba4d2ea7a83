"""A small data-parallel run, for one process or, as a program, for one of two."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.data import Batch, batches, digits, prefetch
from jaxeff.parallelism import batch_sharding, make_mesh, replicate
from jaxeff.training import Aux, Checkpoints, fit, init_state, make_train_step

BATCH_SIZE, STEPS = 48, 6


def problem():
    train, _ = digits()
    k1, k2 = jr.split(jr.key(0))
    params = {
        "hidden": jr.normal(k1, (64, 32)) / 8,
        "bias": jnp.zeros(32),
        "out": jr.normal(k2, (32, 10)) / 8,
    }
    return params, Batch(train.images[:BATCH_SIZE], train.labels[:BATCH_SIZE])


def objective(params, batch):
    x = batch.images.reshape(len(batch.labels), 64) @ params["hidden"]
    # Normalised over the whole batch, as in batch norm: no device knows it alone.
    x = (x - x.mean(0, keepdims=True)) / (x.std(0, keepdims=True) + 0.1)
    logits = jax.nn.relu(x + params["bias"][None]) @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


def train(mesh, folder=None):
    """The weights after all steps; with a folder, through a checkpoint in it."""
    # Not Adam: it divides by the gradient's size, which turns the rounding of a
    # gradient near zero into a whole step.
    tx = optax.sgd(0.1, momentum=0.9)
    loss = lambda params, batch, key: (objective(params, batch), Aux())
    step = make_train_step(loss, tx)
    first = lambda: replicate(init_state(problem()[0], tx, jr.key(0)), mesh)

    def go_on(state, steps, checkpoint=None):
        data = batches(digits()[0], BATCH_SIZE, start_step=int(state.step))
        stream = prefetch(data, batch_sharding(mesh, BATCH_SIZE))
        options = {"steps": steps, "checkpoint": checkpoint}
        return fit(step, state, stream, progress=False, **options)

    state = first()
    if folder is not None:
        with Checkpoints(folder) as checkpoint:
            go_on(state, STEPS // 2, checkpoint)
            state = checkpoint.restore(first())
    state = go_on(state, STEPS)
    # The step leaves the state as it was placed, so the next need not compile anew.
    placed = [
        x.sharding == y.sharding
        for x, y in zip(*map(jax.tree.leaves, (state, first())), strict=True)
    ]
    assert all(placed)
    return jax.device_get(state.params)


def main(address, index, folder):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    mesh = make_mesh()
    assert mesh.shape["data"] == 4 and jax.process_count() == 2
    np.savez(Path(folder) / f"{index}.npz", **train(mesh, Path(folder) / "run"))


if __name__ == "__main__":
    main(*sys.argv[1:])
