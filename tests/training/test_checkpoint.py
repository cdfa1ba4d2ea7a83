import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxeff.training import (
    Aux,
    Checkpoints,
    fit,
    init_state,
    load_meta,
    load_params,
    make_train_step,
    save_params,
)
from jaxeff.tree import paths, pytree, static
from tests.training.small import small_run, TX

ROOT = Path(__file__).resolve().parents[2]


def bits(tree):
    """Every array of a tree by its path, as bytes."""
    raw = lambda x: (
        jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return {k: (x.shape, np.asarray(raw(x)).tobytes()) for k, x in paths(tree).items()}


def run(state, step, data, steps, folder=None):
    first = int(state.step)
    if folder is None:
        return fit(step, state, data(first), steps=steps, progress=False)
    with Checkpoints(folder) as checkpoint:
        return fit(
            step, state, data(first), steps=steps, progress=False, checkpoint=checkpoint
        )


def test_a_resumed_run_is_the_run_without_a_break_bit_for_bit(tmp_path):
    step, state, data = small_run()
    straight = run(state, step, data, 10)
    run(small_run()[1], step, data, 5, tmp_path)

    # Nothing but the folder is left of the first half.

    step, state, data = small_run()
    with Checkpoints(tmp_path) as checkpoint:
        resumed = checkpoint.restore(jax.eval_shape(lambda: state))
        assert int(resumed.step) == checkpoint.latest() == 5
    assert bits(run(resumed, step, data, 10, tmp_path)) == bits(straight)


def test_what_is_saved_is_not_disturbed_by_the_steps_that_follow(tmp_path):
    def ramp():
        params = {"w": jnp.arange(4_000_000.0)}
        return init_state(params, optax.sgd(1.0), jr.key(0))

    # Large enough that the steps, which donate what is saved, overtake the writing.
    down = lambda params, batch, key: (-jnp.sum(params["w"]), Aux())
    state, step = ramp(), make_train_step(down, optax.sgd(1.0))
    with Checkpoints(tmp_path) as checkpoint:
        checkpoint.save(state)
        for _ in range(10):
            state, _ = step(state, None)
        assert float(state.params["w"][0]) == 10
        back = checkpoint.restore(jax.eval_shape(ramp))
    assert bits(back) == bits(ramp())


def light(width=3, tx=TX, steps=0):
    """A state that needs no compilation worth the name."""
    params = {"params": {"kernel": jnp.zeros((2, width)), "bias": jnp.zeros(width)}}
    state = init_state(params, tx, jr.key(0))
    return dataclasses.replace(state, step=jnp.int32(steps))


def test_only_the_last_few_checkpoints_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoint:
        for n in range(5):
            checkpoint.save(light(steps=n))
        assert checkpoint.steps() == [3, 4]


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path):
    half = tmp_path / "7.orbax-checkpoint-tmp"
    (half / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    state = init_state({"w": jnp.ones(2)}, optax.sgd(1.0), jr.key(0))
    with Checkpoints(tmp_path) as checkpoint:
        assert checkpoint.latest() is None
        checkpoint.save(state)
        assert checkpoint.steps() == [0]
    assert not half.exists()


KILLED = """
import os, sys
import jax.numpy as jnp, jax.random as jr, optax
from jaxeff.training import Checkpoints, init_state, make_train_step, Aux

tx = optax.sgd(1.0)
step = make_train_step(lambda p, batch, key: (jnp.sum(p["w"]), Aux()), tx)
checkpoint = Checkpoints(sys.argv[1])
state = init_state({"w": jnp.zeros(20_000_000)}, tx, jr.key(0))
checkpoint.save(state)
checkpoint.wait()
state, _ = step(state, None)
checkpoint.save(state)
os._exit(9)
"""


@pytest.mark.slow
def test_a_run_killed_while_it_saves_keeps_the_checkpoint_before(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=env)
    assert killed.returncode == 9
    like = lambda: init_state({"w": jnp.zeros(20_000_000)}, optax.sgd(1.0), jr.key(0))
    with Checkpoints(tmp_path) as checkpoint:
        assert checkpoint.steps() == [0]
        assert not jnp.any(checkpoint.restore(jax.eval_shape(like)).params["w"])


def test_arrays_come_back_with_the_sharding_they_are_wanted_with(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    save_params(tmp_path / "a", {"w": jnp.arange(16.0)})
    like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
    params, _ = load_params(tmp_path / "a", like)
    assert params["w"].sharding == sharding
    assert jnp.array_equal(params["w"], jnp.arange(16.0))


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_difference(tmp_path):
    with Checkpoints(tmp_path) as checkpoint:
        checkpoint.save(light(width=3))
        said = (
            r"differs in 6 arrays: params/params/bias is \[3\] float32 there and "
            r"\[4\] float32 here; .*Build the same model"
        )
        with pytest.raises(ValueError, match=said):
            checkpoint.restore(light(width=4))


def test_a_checkpoint_of_another_optimizer_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoint:
        checkpoint.save(light())
        with pytest.raises(ValueError, match="opt_state/0/mu/.* and missing here"):
            checkpoint.restore(light(tx=optax.sgd(0.1)))


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoint:
        with pytest.raises(ValueError, match=r"has no checkpoint .*the steps \[\]"):
            checkpoint.restore(light())
        checkpoint.save(light())
        with pytest.raises(ValueError, match=r"no checkpoint 3: .*the steps \[0\]"):
            checkpoint.restore(light(), step=3)


def test_a_run_does_not_write_into_the_folder_of_a_longer_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoint:
        checkpoint.save(light(steps=2))
        with pytest.raises(ValueError, match="holds step 2 and this one is 2"):
            checkpoint.save(light(steps=2))
        never = lambda state, batch: pytest.fail("took a step")
        with pytest.raises(ValueError, match="holds step 2 and this one is 1"):
            fit(never, light(), [], steps=5, checkpoint=checkpoint, progress=False)


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="is a file. Name another"):
        Checkpoints(tmp_path / "a")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Checkpoints(tmp_path / "b", keep=0)


@pytree
class Packed:
    """Stands for a compressed weight: integers, a scale, and what is not an array."""

    values: jax.Array
    scale: jax.Array
    bits: int = static(default=4)


def compressed():
    return {
        "layer": {"kernel": Packed(jnp.arange(-6, 6, dtype=jnp.int8), jnp.ones(3), 8)},
        "list": [
            jnp.full((2, 2), 1.5, jnp.bfloat16),
            None,
            jnp.arange(3, dtype="int4"),
        ],
        "f8": jnp.full(3, 0.5, jnp.float8_e4m3fn),
        "key": jr.key(5, impl="rbg"),
        "empty": jnp.zeros((0, 3)),
        "flag": jnp.array([True, False]),
        "scalar": jnp.float32(2.5),
    }


@pytest.mark.parametrize("shapes_only", [False, True])
def test_a_model_comes_back_whole_with_its_leaves_and_its_meta(tmp_path, shapes_only):
    params, meta = compressed(), {"keep": 0.5, "sizes": {"a": [1, 2]}}
    save_params(tmp_path / "model", params, meta)
    like = (
        jax.eval_shape(compressed)
        if shapes_only
        else jax.tree.map(lambda x: x if x.shape == () else jnp.zeros_like(x), params)
    )
    back, said = load_params(tmp_path / "model", like)
    assert said == load_meta(tmp_path / "model") == meta
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert bits(back) == bits(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype


def test_a_model_is_not_written_over_unless_asked(tmp_path):
    save_params(tmp_path / "model", {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="exists. Name another, or pass overwrite"):
        save_params(tmp_path / "model", {"w": jnp.ones(2)})
    save_params(tmp_path / "model", {"w": jnp.ones(2)}, overwrite=True)
    params, _ = load_params(tmp_path / "model", {"w": jnp.zeros(2)})
    assert jnp.array_equal(params["w"], jnp.ones(2))


def test_a_folder_of_something_else_is_neither_read_nor_deleted(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be a checkpoint, but is another folder"):
        save_params(tmp_path, {"w": jnp.ones(2)}, overwrite=True)
    with pytest.raises(ValueError, match="must be a checkpoint, but is another folder"):
        load_meta(tmp_path)
    with pytest.raises(ValueError, match="must be a checkpoint, but is missing"):
        load_params(tmp_path / "none", {"w": jnp.ones(2)})
    assert (tmp_path / "thesis.tex").exists()


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    params = {"w": jr.normal(jr.key(0), (100, 100))}
    save_params(tmp_path / "model", params)
    for file in (tmp_path / "model" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="must be as it was saved, but reading failed"):
        load_params(tmp_path / "model", params)


def test_what_json_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="meta is saved as JSON, but"):
        save_params(tmp_path / "model", {"w": jnp.ones(2)}, {"x": jnp.ones(2)})
    assert not (tmp_path / "model").exists()


def test_two_arrays_of_one_path_are_an_error(tmp_path):
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="by path, but two share 'a/b'"):
        save_params(tmp_path / "model", params)
