import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff.data import Batch
from jaxeff.parallelism import (
    audit,
    average,
    batch_sharding,
    batch_share,
    make_mesh,
    replicate,
    shard_batch,
)
from jaxeff.parallelism.data_parallel import _share
from jaxeff.training import Aux, init_state, make_train_step
from tests.parallelism import worker
from tests.parallelism.processes import CASES

ROOT = Path(__file__).resolve().parents[2]


def close(a, b):
    return all(
        jax.tree.leaves(
            jax.tree.map(lambda x, y: np.allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
        )
    )


def test_value_and_gradient_are_those_of_one_device():
    mesh, (params, batch) = make_mesh(), worker.problem()
    value_and_grad = jax.jit(jax.value_and_grad(worker.objective))
    one = value_and_grad(params, batch)
    many = value_and_grad(replicate(params, mesh), shard_batch(batch, mesh))
    assert close(one, many)
    assert many[1]["hidden"].sharding.is_fully_replicated


def test_several_optimizer_steps_are_those_of_one_device():
    one = worker.train(make_mesh(devices=jax.devices()[:1]))
    many = worker.train(make_mesh())
    assert close(one, many)
    assert not close(one, worker.problem()[0])


def test_each_device_computes_its_part_of_the_batch():
    mesh, (params, batch) = make_mesh(), worker.problem()
    compiled = (
        jax.jit(jax.grad(worker.objective))
        .lower(replicate(params, mesh), shard_batch(batch, mesh))
        .compile()
    )
    whole = jax.jit(jax.grad(worker.objective)).lower(params, batch).compile()
    assert "all-reduce" in compiled.as_text()
    assert compiled.cost_analysis()["flops"] < whole.cost_analysis()["flops"] / 4


@pytest.mark.parametrize("parts", [1, 4])
def test_the_devices_add_up_once_however_many_parts_a_batch_has(parts):
    mesh, (params, _) = make_mesh(), worker.problem()
    images, labels = jnp.ones((64, 8, 8)), jnp.zeros(64, jnp.int32)
    to = batch_sharding(mesh, 64)
    batch = Batch(jax.device_put(images, to), jax.device_put(labels, to))
    tx = optax.chain(average(devices=8), optax.sgd(0.1))
    loss = lambda params, batch, key: (worker.objective(params, batch), Aux())
    step = make_train_step(loss, tx, accumulate=parts, per_device=mesh)
    state = replicate(init_state(params, tx, jr.key(0)), mesh)
    found = audit(jax.jit(step).lower(state, batch).compile(), mesh)
    gradients = sum(x.nbytes for x in jax.tree.leaves(params))
    assert found.bytes == found.of("all-reduce", "data").bytes == gradients + 4
    # In a loop they would be counted as often as it turns.
    assert all(c.count == 1 for c in found.collectives)


def test_replicate_puts_the_whole_on_every_device_keys_included():
    mesh = make_mesh()
    tree = replicate({"w": jnp.arange(3.0), "key": jr.key(1), "none": None}, mesh)
    assert tree["w"].sharding.is_fully_replicated and len(tree["w"].devices()) == 8
    assert jr.uniform(tree["key"]) == jr.uniform(jr.key(1))


def test_examples_stay_in_order_and_none_is_lost():
    batch = {"x": np.arange(16), "y": np.ones((8, 2, 2))}
    sharded = shard_batch(batch, make_mesh())
    assert np.array_equal(sharded["x"], batch["x"])
    assert [s.data.tolist() for s in sharded["x"].addressable_shards][1] == [2, 3]


def test_processes_that_share_examples_load_the_same():
    assert batch_share(make_mesh()) == (0, 1)
    # Which of eight parts the devices of each process hold.
    apart, together = {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}, {0: {0}, 1: {0}, 2: {1}}
    assert [_share(apart, i) for i in range(2)] == [(0, 2), (1, 2)]
    assert [_share(together, i) for i in range(3)] == [(0, 2), (0, 2), (1, 2)]


@pytest.mark.parametrize("held", [{0: {0, 1}, 1: {1, 2}}, {0: {0, 2}, 1: {1, 3}}])
def test_shares_that_overlap_in_part_or_interleave_are_an_error(held):
    with pytest.raises(ValueError, match="each process loads one run of examples"):
        _share(held, 0)
    with pytest.raises(ValueError, match="and none of process 2"):
        _share(held, 2)


def test_axes_other_than_data_hold_copies():
    x = shard_batch(np.arange(4), make_mesh(tensor=2))
    assert sorted(s.data.tolist() for s in x.addressable_shards) == [
        *([i] for i in (0, 0, 1, 1, 2, 2, 3, 3))
    ]


@pytest.mark.parametrize("n", [0, 12])
def test_a_batch_that_does_not_divide_is_an_error(n):
    mesh = make_mesh()
    said = f"a batch of {n} does not divide by 8. Choose a multiple of 8"
    with pytest.raises(ValueError, match=said):
        shard_batch({"x": np.zeros((n, 2))}, mesh)
    with pytest.raises(ValueError, match=said):
        batch_sharding(mesh, n)


@pytest.mark.slow
def test_two_processes_with_a_checkpoint_between_end_where_one_ends(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.parallelism.worker", address]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    one = worker.train(make_mesh())
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as end:
            assert close(dict(end), one)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_axis_over_several_processes_is_one_device(processes):
    devices = 8 // processes
    launch = [sys.executable, "scripts/launch.py", "--processes", str(processes)]
    options = ["--devices", str(devices), "--grace", "5", "--"]
    run = subprocess.run(
        [*launch, *options, "tests/parallelism/processes.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    held = run.stdout.splitlines()
    assert [name for name in CASES if name in held] == CASES, run.stdout


def test_a_batch_with_a_scalar_is_an_error():
    with pytest.raises(ValueError, match="one is the scalar 3.0. Leave it out"):
        shard_batch({"x": np.ones((8, 2)), "n": np.float32(3)}, make_mesh())
