import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import make_mesh
from jaxeff.pruning import (
    Blocks,
    by_magnitude,
    by_movement,
    by_random,
    by_saliency,
    erk,
    fix_masks,
    global_ranking,
    make_masks,
    masked,
    NofM,
    one_shot,
    periodic,
    polynomial,
    prune,
    prune_by_magnitude,
    straight_through,
    Unstructured,
)
from jaxeff.training import Aux, init_state, make_train_step
from tests.pruning.sparse import at, close, COVERED, example, OPTIMIZERS, step

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_it_trains_as_the_model_without_the_dropped_weights_would[adamw]",
    "test_it_trains_as_the_model_without_the_dropped_weights_would[momentum]",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_the_model_without_the_dropped_weights_would(name, getkey):
    """The kept get the update of `inner` for the gradients that a mask leaves."""
    inner = OPTIMIZERS[name]
    tx = prune(inner, polynomial(0.3, 0.8, begin=1, steps=2), by_saliency())
    params, plain = example(getkey()), inner.init(example(getkey()))
    state, plain = tx.init(params), inner.init(params)
    for t in range(5):
        grads = example(getkey())
        new, state = step(tx, params, state, grads)
        lacking = jax.tree.map(
            lambda m, g: g if m is None else jnp.where(m, g, 0),
            state.mask,
            grads,
            is_leaf=lambda x: x is None,
        )
        expected, plain = step(inner, params, plain, lacking)
        assert close(plain, state.inner)
        assert close(new["bias"], expected["bias"])
        for path in COVERED:
            mask, w = at(state.mask, path), at(new, path)
            assert close(w, jnp.where(mask, at(expected, path), 0))
            assert jnp.all(w[~mask] == 0)
            now = [0, 0.3, 0.7375, 0.8, 0.8][t]
            assert jnp.sum(~mask) == round(now * mask.size)
        params = new


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_saliency_of_narrow_numbers_is_not_lost_and_zeros_are_exact(dtype, getkey):
    params = example(getkey(), dtype)
    # |w g| is far below what a float16 holds.
    grads = jax.tree.map(lambda g: g * 1e-6, example(getkey(), dtype))
    tx = prune(optax.sgd(0.1, momentum=0.9), one_shot(0.5), by_saliency(0.5))
    new, state = step(tx, params, tx.init(params), grads)
    f32 = lambda x: np.asarray(x.astype(jnp.float32))
    for path in COVERED:
        mask = np.asarray(at(state.mask, path))
        assert at(new, path).dtype == dtype and np.all(f32(at(new, path))[~mask] == 0)
        saliency = np.abs(f32(at(params, path)) * f32(at(grads, path)))
        assert (~mask).sum() == mask.size // 2
        assert saliency[mask].min() >= saliency[~mask].max()


def test_saliency_at_the_first_step_over_all_weights_is_snip(getkey):
    params, grads = example(getkey()), example(getkey())
    tx = prune(
        optax.sgd(0.1), one_shot(0.9), by_saliency(), distribution=global_ranking
    )
    _, state = step(tx, params, tx.init(params), grads)
    saliency = [np.abs(at(params, p) * at(grads, p)).ravel() for p in COVERED]
    kept = np.concatenate([np.asarray(at(state.mask, p)).ravel() for p in COVERED])
    # Connection sensitivity, as the paper normalises it: the kappa largest stay.
    connection = np.concatenate(saliency) / np.concatenate(saliency).sum()
    kappa = kept.size - round(0.9 * kept.size)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-connection)[:kappa])


def test_saliency_adds_up_with_its_decay(getkey):
    tx = prune(optax.sgd(0.0), one_shot(0.5, 3), by_saliency(0.7))
    params = example(getkey())
    state, total = tx.init(params), 0
    for _ in range(4):
        grads = example(getkey())
        total = 0.7 * total + np.abs(params["kernel"] * grads["kernel"])
        _, state = step(tx, params, state, grads)
    mask = np.asarray(state.mask["kernel"])
    assert np.allclose(state.memory["kernel"], total, rtol=1e-5)
    assert total[mask].min() >= total[~mask].max()


def test_random_masks_differ_by_weight_seed_and_step_and_by_nothing_else(getkey):
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    def found(seed, at_step):
        tx = prune(optax.sgd(0.1), one_shot(0.5, at_step), by_random(), seed=seed)
        state, w = tx.init(params), params
        for _ in range(at_step + 1):
            w, state = step(tx, w, state, params)
        return state.mask

    first = found(0, 0)
    assert jnp.all(first["a"] == found(0, 0)["a"])
    for other in (first["b"], found(1, 0)["a"], found(0, 1)["a"]):
        assert jnp.sum(~other) == 32 and not jnp.all(first["a"] == other)


def test_each_pattern_has_its_schedule_and_the_first_that_matches_holds(getkey):
    schedules = {"deep/*": one_shot(0.5, 1), "**/{kernel,bias}": one_shot(0.25)}
    tx = optax.chain(optax.adam(1e-2), prune_by_magnitude(schedules))
    params = example(getkey())
    state = tx.init(params)
    for t in range(2):
        params, state = step(tx, params, state, example(getkey()))
        drops = jax.tree.map(lambda m: int(jnp.sum(~m)), state[1].mask)
        deep = [0, 72][t]
        assert drops == {"kernel": 48, "bias": 3, "deep": {"kernel": deep}}
        assert np.array_equal(state[1].sparsity, [[0, 0.5][t], 0.25])


@pytest.mark.parametrize(
    ("pattern", "schedule", "distribution"),
    [
        (Unstructured(per={"deep/kernel": 0}), one_shot(0.75), erk),
        (NofM(2, 4, -2), polynomial(0.0, 0.5, begin=0, steps=4, every=2), None),
        (Blocks(4, 3), periodic(0.3, begin=0, every=1, times=3), global_ranking),
    ],
    ids=["stacked_erk", "n_of_m", "blocks_global"],
)
def test_patterns_and_distributions_combine_and_masks_only_grow(
    pattern, schedule, distribution, getkey
):
    options = {} if distribution is None else {"distribution": distribution}
    tx = prune(optax.adam(3e-2), schedule, pattern=pattern, **options)
    params = example(getkey())
    state = tx.init(params)
    before = state.mask
    for _ in range(6):
        params, state = step(tx, params, state, example(getkey()))
        for path in COVERED:
            assert not jnp.any(at(state.mask, path) & ~at(before, path))
            assert jnp.all(at(params, path)[~at(state.mask, path)] == 0)
        before = state.mask
    deep, kernel = (
        np.asarray(state.mask["deep"]["kernel"]),
        np.asarray(before["kernel"]),
    )
    if isinstance(pattern, Unstructured):
        assert len(set(deep.sum((1, 2)).tolist())) == 1
        assert deep.mean() > kernel.mean()  # the smaller layer is the denser one
    elif isinstance(pattern, NofM):
        assert np.all(deep.reshape(3, 2, 4, 6).sum(2) == 2)
        assert np.all(kernel.reshape(4, 4, 12).sum(1) == 2)
    else:
        tiles = kernel.reshape(4, 4, 4, 3)
        assert np.array_equal(tiles.any((1, 3)), tiles.all((1, 3)))
        dropped = ((~kernel).sum() + (~deep).sum()) / 12
        assert dropped == np.round(np.float32(1 - 0.7**3) * 28)


def test_weights_spread_over_devices_are_pruned_where_they_lie(getkey):
    mesh = make_mesh()
    spread = lambda x: jax.device_put(
        x, NamedSharding(mesh, P(*[None] * (x.ndim - 2), "data") if x.ndim > 1 else P())
    )
    tx = prune(optax.adam(1e-2), one_shot(0.8), distribution=global_ranking)
    params = example(getkey())
    split = jax.tree.map(spread, params)
    state, split_state = tx.init(params), jax.jit(tx.init)(split)
    for _ in range(2):
        grads = example(getkey())
        params, state = step(tx, params, state, grads)
        split, split_state = step(tx, split, split_state, jax.tree.map(spread, grads))
    assert close(params, split)
    eager = tx.init(split)
    for path in COVERED:
        w, mask = at(split, path), at(split_state.mask, path)
        assert at(eager.mask, path).sharding.is_equivalent_to(w.sharding, w.ndim)
        assert np.array_equal(mask, at(state.mask, path))
        assert mask.sharding.is_equivalent_to(w.sharding, w.ndim)


def test_straight_through_trains_all_and_shows_what_the_masks_leave(getkey):
    inner = optax.adam(0.1)
    tx = straight_through(inner, one_shot(0.5), pattern=NofM(2, 4, -2))
    params = example(getkey())
    state, plain = tx.init(params), inner.init(params)
    masks = []
    for _ in range(12):
        grads = example(getkey())
        expected, plain = step(inner, params, plain, grads)
        params, state = step(tx, params, state, grads)
        assert close(params, expected)
        seen = masked(params, state)
        groups = lambda x: np.abs(np.asarray(x["kernel"])).reshape(4, 4, 12)
        # The largest two of every group, as they are now.
        assert np.array_equal(
            groups(seen),
            np.where(
                np.argsort(np.argsort(groups(params), 1), 1) >= 2, groups(params), 0
            ),
        )
        masks.append(state.mask["kernel"])
    assert any(jnp.any(b & ~a) for a, b in zip(masks, masks[1:], strict=False))


def test_gradients_pass_straight_through_a_mask(getkey):
    params, scale = example(getkey()), example(getkey())
    tx = straight_through(optax.sgd(0.1), one_shot(0.5), every=7)
    _, state = step(tx, params, tx.init(params), scale)

    def loss(params):
        seen = masked(params, (optax.EmptyState(), {"pruned": state}))
        return sum(
            jnp.sum(jnp.sin(x) * c)
            for x, c in zip(jax.tree.leaves(seen), jax.tree.leaves(scale), strict=True)
        )

    grads = jax.jit(jax.grad(loss))(params)
    seen = masked(params, state)
    assert jnp.sum(seen["kernel"] == 0) == 96
    # The derivative at what was seen, dropped weights included.
    assert close(grads, jax.tree.map(lambda x, c: jnp.cos(x) * c, seen, scale))


def test_movement_keeps_what_moves_away_from_zero(getkey):
    """Sanh et al. 2020: sums of -w dL/dw, in the library's step, through a view."""
    sign = jnp.sign(jr.normal(getkey(), (16, 4)))
    target = (3 * sign).at[:8].set(0)

    def loss(params, x, key):
        return jnp.mean(jnp.square(x @ (params["w"] - target))), Aux()

    # Those that are not needed are the larger ones at first: only movement tells.
    start = {"w": (sign * (1 + 0.1 * jr.uniform(getkey(), (16, 4)))).at[:8].mul(2)}
    tx = straight_through(optax.sgd(0.05), one_shot(0.5, 3), by_movement())
    train = make_train_step(loss, tx, view=masked)
    state, score = init_state(start, tx, jr.key(0)), 0
    for _ in range(30):
        x, w = jr.normal(getkey(), (64, 16)), np.asarray(state.params["w"])
        seen = masked(state.params, state.opt_state)
        grad = jax.grad(lambda p, x: loss(p, x, None)[0])(seen, x)["w"]
        score = score - w * np.asarray(grad)
        state, _ = train(state, x)
    assert np.allclose(state.opt_state.memory["w"], score, rtol=1e-4, atol=1e-4)
    kept = np.asarray(state.opt_state.mask["w"])
    assert kept.sum() == 32 and score[kept].min() >= score[~kept].max()
    assert np.all(kept[8:])


def test_fixed_masks_hold_whatever_the_optimizer_does(getkey):
    params = example(getkey())
    masks = make_masks(jax.tree.map(jnp.abs, params), 0.75, only="**/kernel")
    tx = optax.chain(optax.adamw(1e-2), fix_masks(masks))
    state = tx.init(params)
    assert state[1].sparsity == pytest.approx(0.75)
    params = masked(params, state)
    for _ in range(3):
        params, state = step(tx, params, state, example(getkey()))
        for path in COVERED:
            assert jnp.array_equal(at(params, path) != 0, at(masks, path))
    assert masks["bias"] is None and jnp.all(params["bias"] != 0)
    for wrong in ({"kernel": jnp.ones((2, 2), bool)}, {"other": jnp.ones(3, bool)}):
        with pytest.raises(ValueError, match=r"no (kernel\[2, 2\]|other\[3\])"):
            fix_masks(wrong).init(params)
    with pytest.raises(ValueError, match="no mask at all"):
        fix_masks({"kernel": None}).init(params)


def test_what_cannot_be_pruned_is_refused(getkey):
    params = example(getkey())
    rule = {"**/kernel": one_shot(0.5)}
    with pytest.raises(ValueError, match="has nothing to say"):
        prune(optax.sgd(0.1), rule, only="kernel").init(params)
    with pytest.raises(ValueError, match="left for 'kernel'"):
        prune(optax.sgd(0.1), {**rule, "kernel": one_shot(0.1)}).init(params)
    with pytest.raises(ValueError, match="2:4 drops 0.5.*ends at 0.9"):
        prune(optax.sgd(0.1), one_shot(0.9), pattern=NofM(2, 4, -2)).init(params)
    with pytest.raises(ValueError, match="groups of 4 divide the 6 weights"):
        prune(optax.sgd(0.1), one_shot(0.5), pattern=NofM(2, 4, -1)).init(
            {"w": jnp.ones((4, 6))}
        )
    with pytest.raises(ValueError, match="this one has none"):
        masked(params, optax.adam(1e-2).init(params))
    with pytest.raises(ValueError, match="every counts steps"):
        straight_through(optax.sgd(0.1), one_shot(0.5), every=0)
    with pytest.raises(ValueError, match=r"decay .* in \[0, 1\], got 2"):
        by_saliency(2)
    for tx in (
        prune(optax.sgd(0.1), one_shot(0.5), by_magnitude()),
        straight_through(optax.sgd(0.1), one_shot(0.5)),
    ):
        with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
            tx.update(params, tx.init(params))
