"""Optimizer states in few bits."""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import tree
from jaxeff.quantization import compress_state, QArray
from jaxeff.quantization.dynamic import Dynamic
from jaxeff.quantization.grids import named

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_training_goes_as_with_the_whole_state[adam-4-1.6]",
    "test_training_goes_as_with_the_whole_state[adam-8-1.15]",
}


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_fill_their_codes_and_are_made_again_by_name(width, signed):
    grid = Dynamic(width, signed)
    assert named(grid.name) == grid and grid.bits == width
    assert len(set(grid.levels)) == 2**width and grid.levels[-1] == 1
    assert list(grid.levels) == sorted(grid.levels)
    # Of what is never negative a root is divided by.
    assert (0.0 in grid.levels) == signed and (signed or grid.levels[0] > 0)
    # Small numbers are kept apart from zero by as much as the paper says.
    positive = [x for x in grid.levels if x > 0]
    assert positive[0] < 10.0 ** (2 - width) or (width, signed) == (4, False)


def problem(n=128):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    target = jnp.tanh(x @ jnp.asarray(rng.normal(size=(64, 16)) / 8, jnp.float32))
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
    params = {"a": draw(64, n), "b": draw(n, 16), "bias": jnp.zeros(16)}
    loss = lambda p: jnp.mean(
        (jnp.tanh(x @ p["a"]) @ p["b"] + p["bias"][None] - target) ** 2
    )
    return params, loss


def train(tx, steps=150):
    params, loss = problem()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return float(loss(params)), state


OPTIMIZERS = {
    "adam": lambda: optax.adam(3e-3),
    "adamw": lambda: optax.adamw(3e-3),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
}


EVERY = [
    pytest.param(n, marks=[] if n == "adam" else pytest.mark.slow) for n in OPTIMIZERS
]


@pytest.mark.parametrize("bits, slack", [(8, 1.15), (4, 1.6)])
@pytest.mark.parametrize("name", EVERY)
def test_training_goes_as_with_the_whole_state(name, bits, slack):
    before = float(problem()[1](problem()[0]))
    whole, _ = train(OPTIMIZERS[name]())
    small, state = train(compress_state(OPTIMIZERS[name](), bits, smallest=1024))
    assert small < slack * whole + 0.02 * before
    assert any(isinstance(x, QArray) for x in jax.tree.leaves(state, is_leaf=is_q))


def is_q(x):
    return isinstance(x, QArray)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_state_takes_the_bits_it_claims(bits):
    params = {"w": jnp.ones((64, 512)), "small": jnp.ones(7)}
    state = compress_state(optax.adam(1e-3), bits, block=128).init(params)
    moments = {p: x for p, x in tree.paths(state, is_q).items() if is_q(x)}
    assert sorted(p.split("/")[-2] for p in moments) == ["mu", "nu"]
    for path, x in moments.items():
        assert 8 * tree.tree_bytes(x) / x.size == bits + 32 / 128
        assert x.grid == ("u" if "/nu/" in path else "") + f"dynamic{bits}"


def run(tx, grads, params, steps=20):
    """The weights after some steps, with the state of the last."""
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    state = tx.init(params)
    for i in range(steps):
        now = jax.tree.map(lambda g, i=i: g[i], grads)
        updates, state = step(now, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_no_weight_leaps_whatever_magnitudes_share_a_scale(bits, spread):
    rng = np.random.default_rng(0)
    sizes = np.exp(spread * rng.normal(size=4096)) * 1e-3
    grads = jnp.asarray(rng.normal(size=(20, 4096)) * sizes, jnp.float32)
    far = lambda tx: float(jnp.abs(run(tx, grads, jnp.zeros(4096))[0]).max())
    assert far(compress_state(optax.adam(1e-3), bits)) < 1.2 * far(optax.adam(1e-3))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_without_gradients_stay_and_the_first_gradient_moves_them_as_far(bits):
    # Every second weight has none, among others and in blocks of their own.
    some = jnp.ones((4, 4096)).at[:, ::2].set(0).at[:, 2048:].set(0)
    tx = compress_state(optax.adam(1e-3), bits)
    w, state = run(tx, some, jnp.zeros(4096), 4)
    assert jnp.all((w == 0) == (some[0] == 0)) and jnp.isfinite(w).all()
    assert jnp.abs(w).max() < 1.01 * 4e-3
    # Epsilon decides where the moment is 0, so here it is not swamped.
    updates, _ = tx.update(jnp.full(4096, 1e-12), tx.init(w), w)
    np.testing.assert_allclose(updates, -1e-7, rtol=0.01)
    updates, _ = tx.update(jnp.ones(4096), state, w)
    assert jnp.all(updates < 0) and jnp.abs(updates).max() < 4e-3


def grids(tx, params):
    found = tree.paths(compress_state(tx).init(params), is_q)
    return {p.split("/")[-2]: x.grid for p, x in found.items() if is_q(x)}


SIGNED, UNSIGNED = "dynamic8", "udynamic8"


@pytest.mark.parametrize("name", ["w", "nu", "mu", "z"])
def test_what_a_weight_is_called_changes_nothing(name):
    params = {name: jnp.zeros(4096)}
    grads = {name: jnp.linspace(-1, 1, 20 * 4096).reshape(20, 4096)}
    new, state = run(compress_state(optax.adam(1e-3)), grads, params, 3)
    assert [state[0].mu[name].grid, state[0].nu[name].grid] == [SIGNED, UNSIGNED]
    np.testing.assert_allclose(new[name][:1000], 3e-3, rtol=0.1)


class Weights(NamedTuple):
    nu: jax.Array
    z: jax.Array


def test_attributes_of_the_weights_are_not_those_of_the_state():
    params = Weights(jnp.zeros(4096), jnp.zeros(4096))
    state = compress_state(optax.contrib.schedule_free_adamw(1e-2)).init(params)
    assert not any(map(is_q, state.z))
    (adam,) = [x for x in state.base_optimizer_state if hasattr(x, "nu")]
    assert [x.grid for x in adam.nu] == [UNSIGNED] * 2
    (adam, *_) = compress_state(optax.adam(1e-3)).init(params)
    assert [x.grid for x in adam.mu] == [SIGNED] * 2


@pytest.mark.parametrize(
    "name, signed, unsigned",
    [
        ("amsgrad", ["mu"], ["nu", "nu_max"]),
        ("adagrad", [], ["sum_of_squares"]),
        ("adadelta", [], ["e_g", "e_x"]),
        ("adan", ["m", "v"], ["n"]),
        ("sm3", ["nu"], []),
        ("lion", ["mu"], []),
        ("contrib.prodigy", ["exp_avg", "grad_sum"], ["exp_avg_sq"]),
        ("contrib.madgrad", ["s"], ["grad_sum_sq"]),
        ("contrib.muon", ["mu"], []),
    ],
)
def test_second_moments_go_without_a_sign_and_what_is_no_moment_stays(
    name, signed, unsigned
):
    make = optax
    for part in name.split("."):
        make = getattr(make, part)
    found = grids(make(1e-3), {"w": jnp.ones((64, 512))})
    assert found == dict.fromkeys(signed, SIGNED) | dict.fromkeys(unsigned, UNSIGNED)


def test_differences_of_moments_and_gathered_gradients_stay_exact():
    params = {"w": jnp.ones((64, 512))}
    assert not grids(optax.rmsprop(1e-3, centered=True), params)
    assert not grids(
        optax.MultiSteps(optax.sgd(1e-3), 2).gradient_transformation(), params
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("last", [1, 2, 3, 5, 16, 48, 255, 256, 300, 1024])
def test_every_state_shrinks_by_as_much_as_is_said_or_stays(last, dtype, bits):
    x = jax.ShapeDtypeStruct((4096, last), dtype)
    tx = compress_state(optax.sgd(0.1, momentum=0.9), bits)
    (small,) = jax.tree.leaves(jax.eval_shape(tx.init, x)[0], is_leaf=is_q)
    taken, whole = tree.tree_bytes(small), x.size * x.dtype.itemsize
    b = np.gcd(256, last) if np.gcd(256, last) >= 16 else last
    said = (bits * x.size + 32 * x.size // b) / 8
    said += 4096 / 2 if bits == 4 and last % 2 else 0
    assert taken == (said if 3 * said <= 2 * whole else whole)
    assert is_q(small) == (taken < whole)


def test_the_state_has_one_structure_from_the_first_step_on():
    params, loss = problem()
    tx = compress_state(optax.adam(1e-3), 4, smallest=1024)
    state = tx.init(params)
    _, new = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state
    )
    assert all(jax.tree.leaves(same))


def test_other_states_are_named_by_pattern():
    params = {"w": jnp.ones((64, 512))}
    tx = compress_state(optax.rmsprop(1e-3), unsigned="**/nu/*")
    assert tree.paths(tx.init(params), is_q)["0/nu/w"].grid == "udynamic8"
    with pytest.raises(ValueError, match="matches none of the .* states"):
        compress_state(optax.adam(1e-3), unsigned="**/squares/**").init(params)
    own = optax.GradientTransformation(lambda p: {"speed": p}, lambda g, s, p: (g, s))
    assert not is_q(compress_state(own).init(params)["speed"]["w"])
    state = compress_state(own, signed="speed/**").init(params)
    assert state["speed"]["w"].grid == "dynamic8"


def test_what_cannot_be_is_one_clear_line():
    for options in ({"bits": 3}, {"block": 0}):
        with pytest.raises(ValueError, match="8 or 4 bits, in blocks of 1 or more"):
            compress_state(optax.adam(1e-3), **options)
    with pytest.raises(ValueError, match="got adam. Call it first"):
        inspect.unwrap(compress_state)(optax.adam)  # ours, not the type checker's
