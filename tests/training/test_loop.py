import itertools
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from jaxeff.data import prefetch
from jaxeff.training import (
    Aux,
    Checkpoints,
    fit,
    init_state,
    make_train_step,
    Metrics,
    NonFiniteLoss,
    read_metrics,
)
from jaxeff.tree import pytree

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_time_out_hears_of_each_step_that_ends_after_a_pause",
}

ROOT = Path(__file__).resolve().parents[2]
TX = optax.sgd(0.1)


def counting(params, batch, key):
    """The loss is the number in the batch."""
    return jnp.mean(batch) + 0 * jnp.sum(params["w"]), Aux({"double": 2 * batch[0]})


STEP = make_train_step(counting, TX)


def start():
    return init_state({"w": jnp.ones(2)}, TX, jr.key(0))


def numbers(*bad, first=1):
    """Batch n holds n, or what `bad` says: pairs (n, value)."""
    special = dict(bad)
    for n in itertools.count(first):
        yield jnp.full(4, special.get(n, n), jnp.float32)


def test_the_run_takes_as_many_steps_as_asked_for_in_all():
    state = fit(STEP, start(), numbers(), steps=7, progress=False)
    assert int(state.step) == 7
    state = fit(STEP, state, numbers(), steps=9, progress=False)
    assert int(state.step) == 9
    assert fit(STEP, state, iter([]), steps=9, progress=False) is state
    with pytest.raises(ValueError, match="at step 9, past the 5 steps"):
        fit(STEP, state, numbers(), steps=5, progress=False)


def test_each_line_of_metrics_is_of_its_own_step(tmp_path):
    with Metrics(tmp_path) as metrics:
        fit(
            STEP,
            start(),
            numbers(),
            steps=10,
            progress=False,
            metrics=metrics,
            log_every=3,
            eval_fn=lambda params: {"sum": float(params["w"].sum())},
            eval_every=5,
        )
    lines = read_metrics(tmp_path)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [3, 6, 9, 10]
    for line in logged:
        assert line["loss"] == line["step"] and line["double"] == 2 * line["step"]
        assert line["examples_per_second"] >= 0
    assert [x for x in lines if "sum" in x] == [
        {"step": 5, "sum": 2.0},
        {"step": 10, "sum": 2.0},
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 4, 6, 10])
def test_a_bad_loss_stops_the_run_at_its_step_and_is_never_saved(tmp_path, bad, at):
    with Checkpoints(tmp_path, keep=1) as checkpoint:
        with pytest.raises(NonFiniteLoss, match=f"loss is {bad} at step {at},") as e:
            fit(
                STEP,
                start(),
                numbers((at, bad)),
                steps=10,
                progress=False,
                checkpoint=checkpoint,
                checkpoint_every=2,
            )
        good = (at - 1) // 2 * 2
        assert e.value.step == at
        assert checkpoint.steps() == ([good] if good else [])
        if good:
            assert f"last good checkpoint is step {good} in" in str(e.value)
            assert int(checkpoint.restore(start()).step) == good


def test_weights_that_turned_infinite_are_never_saved(tmp_path):
    def loss(params, batch, key):  # finite at 0, where its gradient is not
        return jnp.sum(jnp.sqrt(params["w"] * batch[0])), Aux()

    step = make_train_step(loss, TX)
    with Checkpoints(tmp_path) as checkpoint:
        with pytest.raises(NonFiniteLoss, match="a weight is not finite at step 4"):
            fit(
                step,
                start(),
                numbers((1, 1e-9), (2, 1e-9), (3, 1e-9), (4, 0)),
                steps=6,
                progress=False,
                checkpoint=checkpoint,
                checkpoint_every=2,
            )
        assert checkpoint.steps() == [2]


@pytree
class Skips:
    """A scaler that never finds a scale."""

    n: object

    def scale(self, loss):
        return loss

    def unscale(self, grads):
        return grads

    def adjust(self, finite):
        return self


def skipping():
    def loss(params, batch, key):
        return jnp.sum(params["w"]) * batch[0], Aux()

    scaler = Skips(jnp.ones([]))
    state = init_state({"w": jnp.ones(2)}, TX, jr.key(0), scaler=scaler)
    return make_train_step(loss, TX), state


def test_a_skipped_step_may_have_any_loss():
    step, state = skipping()
    bad = float("inf")
    state = fit(step, state, numbers((2, bad), (3, bad)), steps=5, progress=False)
    assert int(state.step) == 5 and jnp.all(jnp.isfinite(state.params["w"]))


def test_a_run_that_skips_every_step_is_stopped():
    step, state = skipping()
    endless = itertools.repeat(jnp.full(4, jnp.nan))
    with pytest.raises(NonFiniteLoss, match="no gradient was finite for 50 steps"):
        fit(step, state, endless, steps=1000, progress=False)


def test_batches_that_end_early_are_an_error():
    three = itertools.islice(numbers(), 3)
    with pytest.raises(ValueError, match="takes 5 batches, but they ended after 3"):
        fit(STEP, start(), three, steps=5, progress=False)


def test_a_finished_run_leaves_no_thread_of_its_prefetch():
    before = set(threading.enumerate())
    fit(STEP, start(), prefetch(numbers()), steps=3, progress=False)
    new = set(threading.enumerate()) - before
    assert not [t for t in new if t.name == "prefetch"]


def test_evaluation_sees_the_weights_of_its_step():
    seen = []
    down = make_train_step(lambda p, b, k: (jnp.sum(p["w"]), Aux()), optax.sgd(1.0))
    fit(
        down,
        init_state({"w": jnp.zeros(1)}, optax.sgd(1.0), jr.key(0)),
        numbers(),
        steps=6,
        progress=False,
        eval_fn=lambda params: seen.append(float(params["w"][0])) or {},
        eval_every=2,
    )
    assert seen == [-2, -4, -6]


SLOW_DATA = """
import time
from tests.training.test_loop import fit, numbers, start, STEP

slow = (time.sleep(0.3) or batch for batch in numbers())
pause = {"eval_every": 5, "eval_fn": lambda params: {}}
state = fit(STEP, start(), slow, steps=10, progress=False, timeout=1.0, **pause)
print(int(state.step))
"""


def test_the_time_out_hears_of_each_step_that_ends_after_a_pause():
    """Of which none is read until LAG more are queued, 2.7 s later."""
    command = [sys.executable, "-c", SLOW_DATA]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr
