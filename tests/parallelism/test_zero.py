import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import (
    audit,
    batch_sharding,
    make_mesh,
    replicate,
    shard,
    zero,
)
from tests.parallelism.models import loss_problem, near

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_it_computes_what_the_optimizer_computes_and_keeps_a_part[{'tensor': 2}]",
    "test_it_computes_what_the_optimizer_computes_and_keeps_a_part[{}]",
}

# Clipping looks at all weights at once, and the counter of Adam at none.
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))


def stepper(loss, tx):
    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def trained(loss, tx, params, x, steps=4):
    step, state = stepper(loss, tx), tx.init(params)
    for _ in range(steps):
        params, state, value = jax.block_until_ready(step(params, state, x))
    return params, state, value


def parts_of(state):
    """The numbers that a device keeps, of those in all."""
    arrays = jax.tree.leaves(state)
    own = sum(x.addressable_shards[0].data.size for x in arrays)
    return own / sum(x.size for x in arrays)


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}], ids=str)
def test_it_computes_what_the_optimizer_computes_and_keeps_a_part(axes):
    loss, params, x = loss_problem("gpt", examples=8)
    mesh = make_mesh(**axes)
    if axes:
        loss, placed = shard(loss, params, x, mesh=mesh)
    else:
        placed = replicate(params, mesh)
    tx = zero(TX, mesh=mesh, least=64)
    spread = jax.device_put(x, batch_sharding(mesh, len(x)))
    many, state, value = trained(loss, tx, placed, spread)
    one, _, want = trained(loss, TX, params, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    # Adam divides by the size of a gradient, so what rounding left of one counts.
    near(many, one, rel=1e-3)
    # What is too small, or does not divide, stays whole.
    assert parts_of(state) < 0.15
    assert parts_of(tx.init(placed)) == parts_of(state)
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, many, placed)))


def test_a_device_gets_its_part_of_the_sum_and_the_updates_are_gathered(tpus):
    mesh = make_mesh(devices=tpus("v5e:2x4"))
    on = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    params, x = {"w": on((512, 1024))}, on((64, 512), "data")
    tx = zero(optax.adam(0.1), mesh=mesh)
    loss = lambda params, x: ((x @ params["w"]) ** 2).mean()
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda s: on(s.shape, None, "data") if s.ndim else s, state)
    step = stepper(loss, tx)
    with jax.default_matmul_precision("highest"):
        compiled = step.lower(params, state, x).compile()
    found = audit(compiled, mesh)
    weights = 512 * 1024 * 4
    assert found.of("reduce-scatter", "data").bytes == weights
    assert found.of("all-gather", "data").bytes == weights
    assert found.of("all-reduce").bytes <= 8  # the loss


LABELS = {"a": "one", "b": "other", "c": "one"}
OTHERS = {
    "masked": optax.masked(optax.adam(1e-2), {"a": True, "b": False, "c": True}),
    "partition": optax.partition(
        {"one": optax.adam(1e-2), "other": optax.sgd(0.1)}, LABELS
    ),
    "frozen": optax.partition(
        {"one": optax.adam(1e-2), "other": optax.set_to_zero()}, LABELS
    ),
    "muon": optax.contrib.muon(1e-2),
    "sm3": optax.sm3(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("tx", OTHERS.values(), ids=OTHERS)
def test_the_optimizer_may_be_any(tx):
    keys = jr.split(jr.key(0), 3)
    shapes = {"a": (16, 8), "b": (16,), "c": (8, 16)}
    params = {
        n: jr.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)
    }
    loss = lambda params, x: sum((jnp.sin(p) * x).sum() for p in params.values())
    mesh = make_mesh()
    parts = zero(tx, mesh=mesh, least=16)
    many, state, _ = trained(loss, parts, replicate(params, mesh), jnp.float32(2))
    one, whole, _ = trained(loss, tx, params, jnp.float32(2))
    near(many, one)
    near(state.state, whole)
    moments = [
        x for x in jax.tree.leaves(state) if x.shape in (shapes["a"], shapes["c"])
    ]
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in moments)


def test_errors():
    mesh = make_mesh()
    tx = zero(optax.adam(0.1), mesh=mesh)
    with pytest.raises(ValueError, match=r"the shape \(8, 8\). Take a number"):
        tx.init({"w": jnp.ones((8, 8))})
    params = {"w": jnp.ones((256, 256))}
    state = tx.init(replicate(params, mesh))
    with pytest.raises(ValueError, match="the axes x, and none is called data"):
        zero(optax.adam(0.1), mesh=jax.make_mesh((8,), ("x",)))
    with pytest.raises(ValueError, match="the state is that of 1 weights, but here"):
        tx.update({**params, "b": jnp.ones(3)}, state, params)
