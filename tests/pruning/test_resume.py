"""A run that prunes goes on from a checkpoint as if it had not stopped."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff.pruning import by_saliency, polynomial, prune, prune_by_magnitude, rigl
from jaxeff.training import Aux, Checkpoints, init_state, make_train_step

# What prunes, and how many of 30 weights may be zero in the end.
TRANSFORMS = {
    "magnitude": (
        optax.chain(
            optax.adam(1e-2),
            prune_by_magnitude(
                polynomial(0.1, 0.7, begin=0, steps=6, every=3), only="kernel"
            ),
        ),
        range(21, 22),
    ),
    "a mask with memory": (
        prune(
            optax.adam(1e-2),
            {"kernel": polynomial(0.1, 0.7, begin=0, steps=6, every=3)},
            by_saliency(0.9),
        ),
        range(21, 22),
    ),
    "rewiring": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            rigl(optax.adam(1e-2), 0.5, every=2, until=20, only="kernel"),
        ),
        range(15, 31),  # what grows back begins at zero
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(name, tmp_path, getkey):
    def loss(params, x, key):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"])), Aux()

    tx, zeros = TRANSFORMS[name]
    params = {"kernel": jr.normal(getkey(), (6, 5)), "bias": jnp.ones((1, 5))}
    train, data = make_train_step(loss, tx), jr.normal(getkey(), (8, 4, 6))
    state = init_state(params, tx, jr.key(0))
    for x in data[:4]:
        state, _ = train(state, x)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(state)
        again = checkpoints.restore(jax.eval_shape(lambda: state))
    for x in data[4:]:
        state, _ = train(state, x)
        again, _ = train(again, x)
    assert jax.tree.structure(state) == jax.tree.structure(again)
    for part in ("params", "opt_state"):
        leaves = [jax.tree.leaves(getattr(s, part)) for s in (state, again)]
        assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    assert int(jnp.sum(again.params["kernel"] == 0)) in zeros
