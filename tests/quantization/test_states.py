"""Optimizer states in few bits."""

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
    assert (0.0 in grid.levels) == (signed or width == 8)
    # Small numbers are kept apart from zero by as much as the paper says.
    positive = [x for x in grid.levels if x > 0]
    assert positive[0] < 10.0 ** (2 - width) or not signed


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


def test_what_cannot_be_is_one_clear_line():
    for options in ({"bits": 3}, {"block": 0}):
        with pytest.raises(ValueError, match="8 or 4 bits, in blocks of 1 or more"):
            compress_state(optax.adam(1e-3), **options)
