import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import make_mesh
from jaxeff.pruning import (
    Blocks,
    by_magnitude,
    erk,
    layer_sparsities,
    masked,
    NofM,
    one_shot,
    prune,
    rewire,
    rigl,
    sparse_evolution,
    uniform,
    Unstructured,
)
from jaxeff.pruning.rewire import renewed
from jaxeff.quantization import compress_state
from tests.pruning.sparse import at, close, COVERED, example, OPTIMIZERS, SHAPES, step

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_number_of_weights_stays_and_those_that_stay_train_as_ever[adafactor]",
    "test_the_number_of_weights_stays_and_those_that_stay_train_as_ever[adamw]",
    "test_a_compressed_state_is_refused_and_compresses_outside",
    "test_the_number_of_weights_stays_and_those_that_stay_train_as_ever[momentum]",
}


def counts(masks):
    return {path: int(jnp.sum(at(masks, path))) for path in COVERED}


def left(stay, x):
    """A tree with zeros where a weight does not stay."""
    kernel = jnp.where(stay["kernel"], x["kernel"], 0)
    deep = jnp.where(stay["deep/kernel"], x["deep"]["kernel"], 0)
    return {"bias": x["bias"], "kernel": kernel, "deep": {"kernel": deep}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_number_of_weights_stays_and_those_that_stay_train_as_ever(name, getkey):
    """And a new weight is zero, with the optimizer state of a new weight."""
    inner = OPTIMIZERS[name]
    tx = rigl(inner, 0.7, every=2, until=7)
    params = example(getkey())
    state = tx.init(params)
    params, first, moves = masked(params, state), counts(state.mask), 0
    for t in range(9):
        grads = example(getkey())
        new, after = step(tx, params, state, grads)
        assert counts(after.mask) == first
        # What `inner` makes of the weights that were and are there.
        stay = {p: at(state.mask, p) & at(after.mask, p) for p in COVERED}
        only = functools.partial(left, stay)
        keep = {
            "bias": None,
            "kernel": stay["kernel"],
            "deep": {"kernel": stay["deep/kernel"]},
        }
        held = renewed(state.inner, inner.init(only(params)), keep)
        expected, held = step(inner, params, held, only(grads))
        assert close(held, after.inner)
        assert close(new["bias"], expected["bias"])
        for path in COVERED:
            before, now = at(state.mask, path), at(after.mask, path)
            w = at(new, path)
            assert close(w, jnp.where(stay[path], at(expected, path), 0))
            assert jnp.all(w[~stay[path]] == 0)
            moved = int(jnp.sum(now & ~before))
            assert moved == int(jnp.sum(before & ~now))
            assert moved == 0 or t in (2, 4, 6)
            moves += moved
        params, state = new, after
    assert moves > 20


@pytest.mark.parametrize("name", ["momentum", "adamw", "several", "part"])
def test_the_moments_of_what_is_not_there_are_zero(name, getkey):
    tx = rigl(OPTIMIZERS[name], 0.7, every=2, until=99, fraction=0.5)
    params = example(getkey())
    state, found = tx.init(params), 0
    for _ in range(5):
        before = state.mask
        params, state = step(tx, params, state, example(getkey()))
    for path in COVERED:
        absent = ~(at(state.mask, path) & at(before, path))
        shape = absent.shape
        for x in jax.tree.leaves(state.inner):
            if x.shape == shape:
                found += 1
                assert jnp.all(x[absent] == 0) and jnp.any(x[~absent] != 0)
    assert found >= 2


def test_it_is_algorithm_1_of_the_paper(getkey):
    """The smallest weights drop, the largest gradients of the others grow."""
    tx = rigl(optax.sgd(0.0), 0.75, every=3, until=30, fraction=0.4)
    params = example(getkey())
    state = tx.init(params)
    params = masked(params, state)
    for t in range(31):
        grads = example(getkey())
        before = state.mask
        new, state = step(tx, params, state, grads)
        for path in COVERED:
            mask, w, g = (np.asarray(at(x, path)) for x in (before, params, grads))
            mask, w, g = mask.ravel(), np.abs(w.ravel()), np.abs(g.ravel())
            if t % 3 == 0 and 0 < t < 30:
                kept = int(mask.sum())
                k = int(np.round(0.4 / 2 * (1 + np.cos(t * np.pi / 30)) * kept))
                active = np.flatnonzero(mask)
                stay = set(active[np.argsort(w[active], kind="stable")[k:]])
                others = np.array([i for i in range(mask.size) if i not in stay])
                grown = set(others[np.argsort(g[others])[::-1][:k]])
                mask = np.isin(np.arange(mask.size), list(stay | grown))
            assert np.array_equal(np.asarray(at(state.mask, path)).ravel(), mask)
        # New weights get a value at once, so that the next ranking is no tie.
        params = masked(example(getkey()), state)


def test_what_just_dropped_may_come_back_with_its_value(getkey):
    tx = rigl(optax.adam(1e-2), 0.5, every=1, until=99, fraction=0.9, only="kernel")
    params = example(getkey())
    state = tx.init(params)
    params = masked(params, state)
    # Where only kept weights have gradients, all that dropped comes back.
    for _ in range(3):
        ones = masked(jax.tree.map(jnp.ones_like, params), state)
        before = state.mask["kernel"]
        params, state = step(tx, params, state, ones)
        assert jnp.array_equal(before, state.mask["kernel"])
        assert jnp.all(params["kernel"][before] != 0)


def test_random_growth_looks_at_no_gradient(getkey):
    params, grads = example(getkey()), example(getkey())

    def masks(seed, scale):
        tx = sparse_evolution(optax.sgd(0.1), 0.7, every=1, until=9, seed=seed)
        state = tx.init(params)
        w = masked(params, state)
        first = state.mask
        for g in (jax.tree.map(jnp.zeros_like, grads), scale(grads)):
            w, state = step(tx, w, state, g)
        return first["kernel"], state.mask["kernel"]

    first, plain = masks(0, lambda g: g)
    _, other = masks(0, lambda g: jax.tree.map(jnp.negative, g))
    assert jnp.array_equal(plain, other)
    assert int(jnp.sum(plain & ~first)) > 0
    elsewhere, _ = masks(1, lambda g: g)
    assert not jnp.array_equal(first, elsewhere)
    assert int(jnp.sum(first)) == int(jnp.sum(elsewhere)) == int(jnp.sum(plain))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "distribution"),
    [
        (NofM(2, 4, -2), 0.5, uniform),
        (Blocks(4, 3), 0.5, uniform),
        (Unstructured(per={"deep/kernel": 0}), {"**/kernel": 0.6}, erk),
    ],
    ids=["n_of_m", "blocks", "stacked"],
)
def test_patterns_hold_while_it_rewires(pattern, sparsity, distribution, getkey):
    tx = rigl(
        optax.adam(1e-2),
        sparsity,
        every=1,
        until=20,
        fraction=0.9,
        pattern=pattern,
        distribution=distribution,
    )
    params = example(getkey())
    state = tx.init(params)
    first = state.mask
    for _ in range(4):
        params, state = step(tx, params, state, example(getkey()))
    assert counts(state.mask) == counts(first)
    deep, kernel = (
        np.asarray(state.mask["deep"]["kernel"]),
        np.asarray(state.mask["kernel"]),
    )
    assert not np.array_equal(kernel, first["kernel"])
    if isinstance(pattern, NofM):
        assert np.all(deep.reshape(3, 2, 4, 6).sum(2) == 2)
        assert np.all(kernel.reshape(4, 4, 12).sum(1) == 2)
    elif isinstance(pattern, Blocks):
        tiles = deep.reshape(3, 2, 4, 2, 3)
        assert np.array_equal(tiles.any((2, 4)), tiles.all((2, 4)))
    else:
        assert len(set(deep.sum((1, 2)).tolist())) == 1


def test_the_first_masks_are_distributed_as_asked(getkey):
    state = rigl(optax.sgd(0.1), 0.8, every=1, until=2).init(example(getkey()))
    shapes = {"kernel": SHAPES["kernel"], "deep/kernel": SHAPES["deep"]["kernel"]}
    for path, sparsity in layer_sparsities(shapes, 0.8, erk).items():
        mask = at(state.mask, path)
        assert int(jnp.sum(~mask)) == round(sparsity * mask.size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dropped_weights_are_exactly_zero_in_every_dtype(dtype, getkey):
    tx = rigl(optax.adam(1e-2), 0.7, every=1, until=9)
    params = example(getkey(), dtype)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(tx, params, state, example(getkey(), dtype))
        for path in COVERED:
            assert at(params, path).dtype == dtype
            assert jnp.all(at(params, path)[~at(state.mask, path)] == 0)


def test_spread_over_devices_it_rewires_as_on_one(getkey):
    mesh = make_mesh(data=4, tensor=2)
    specs = {1: P(), 2: P("data", "tensor"), 3: P(None, "data", "tensor")}
    spread = lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim]))
    tx = rigl(optax.adam(1e-2), 0.6, every=1, until=9)
    params = example(getkey())
    split = jax.tree.map(spread, params)
    state, split_state = tx.init(params), jax.jit(tx.init)(split)
    for _ in range(3):
        grads = example(getkey())
        params, state = step(tx, params, state, grads)
        split, split_state = step(tx, split, split_state, jax.tree.map(spread, grads))
    assert close(params, split)
    assert all(
        np.array_equal(at(state.mask, p), at(split_state.mask, p)) for p in COVERED
    )


def test_parts_of_a_model_have_transforms_of_their_own(getkey):
    """By optax: each sees its own weights, and `masked` shows what all of them do."""
    adam = optax.adam(1e-2)
    tx = optax.multi_transform(
        {"a": rigl(adam, 0.5, every=1, until=9), "b": prune(adam, one_shot(0.25))},
        {"kernel": "a", "bias": "b", "deep": {"kernel": "b"}},
    )
    params = example(getkey())
    state = tx.init(params)
    for _ in range(3):
        params, state = step(tx, params, state, example(getkey()))
    dropped = lambda x: int(jnp.sum(x == 0))
    for _ in range(2):
        assert dropped(params["kernel"]) >= 96 and dropped(params["bias"]) == 0
        assert dropped(params["deep"]["kernel"]) == 36
        params = masked(jax.tree.map(jnp.ones_like, params), state)
    assert dropped(params["kernel"]) == 96


def test_entries_of_a_weight_are_told_by_the_longest_end_of_their_path():
    params = {"a": {"w": jnp.ones(3)}, "w": jnp.ones(3)}
    tx = optax.MultiSteps(optax.adam(1e-2), 2)
    old = jax.tree.map(lambda x: x + 7, tx.init(params))
    fresh = jax.tree.map(lambda x: x * 0, old)
    stay = {"a": {"w": jnp.array([True, False, True])}, "w": None}
    new = renewed(old, fresh, stay)
    mu = new.inner_opt_state[0].mu
    assert mu["a"]["w"].tolist() == [7, 0, 7] and mu["w"].tolist() == [7, 7, 7]
    assert new.acc_grads["a"]["w"].tolist() == [7, 0, 7]
    assert new.mini_step == 7


def test_a_compressed_state_is_refused_and_compresses_outside(getkey):
    params, rules = example(getkey()), {"every": 1, "until": 9}
    tx = rigl(compress_state(optax.adam(1e-2), smallest=16), 0.5, **rules)
    with pytest.raises(ValueError, match="this one keeps it compressed"):
        tx.init(params)
    tx = compress_state(rigl(optax.adam(1e-2), 0.5, **rules), smallest=16)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(tx, params, state, example(getkey()))
    assert int(jnp.sum(params["kernel"] == 0)) >= params["kernel"].size // 2


def test_numbers_out_of_range_are_refused(getkey):
    good = functools.partial(rewire, optax.sgd(0.1), grow=by_magnitude())
    for options, says in [
        ({"every": 0, "until": 9}, "every counts steps"),
        ({"every": 1, "until": 0}, "until counts steps"),
        ({"every": 1, "until": 9, "fraction": 1}, r"fraction .* \(0, 1\), got 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            good(0.5, **options)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 90"):
        good({"**": 90}, every=1, until=9)
    tx = good(0.5, every=1, until=9)
    with pytest.raises(ValueError, match="nothing to prune"):
        tx.init({"bias": jnp.ones(3)})
    params = example(getkey())
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
