"""What is chosen to leave: scopes, widths, budgets, approximations, whole blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from jaxeff import trace, tree
from jaxeff.models import CNN, ResNet
from jaxeff.program import like
from jaxeff.pruning import (
    activation,
    Budget,
    flops,
    magnitude,
    parameters,
    random,
    select,
    shrink,
    taylor,
)
from jaxeff.pruning.select import Widths
from jaxeff.quantization import int4, quantize
from tests.zoo import draw

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_budget_is_kept_and_hardly_undercut[global]",
    "test_a_budget_is_kept_and_hardly_undercut[local]",
}

X = jnp.ones((2, 3))


def two(p, x):
    """Two hidden layers: of 8 and of 4."""
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def weights(first=1.0, second=1.0):
    a, b, c = jr.split(jr.key(0), 3)
    return {
        "a": first * jr.normal(a, (3, 8)),
        "b": jr.normal(b, (8, 4)),
        "c": second * jr.normal(c, (4, 2)),
    }


def widths(params):
    return params["a"].shape[1], params["b"].shape[1]


def resnet(key):
    model, x = ResNet(depth=8, width=4, classes=5), jr.normal(key, (2, 8, 8, 3))
    params = draw(key, jax.eval_shape(model.init, jr.key(0), x))
    return model, params, x


def close(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


# Scopes and widths.


def test_globally_the_best_of_all_stay():
    params = weights(first=100.0)
    _, local = shrink(two, params, X, keep=0.5)
    options = {"scope": "global", "normalize": "none", "score": magnitude(2)}
    _, whole = shrink(two, params, X, keep=2 / 3, **options)
    assert widths(local) == (4, 2)
    assert widths(whole) == (8, 1)  # the large ones all stay, the floor holds
    groups = {"{a,b}": 0.5, "{b,c}": 0.5}
    _, apart = shrink(two, params, X, keep=groups, **options)
    assert widths(apart) == (4, 2)


def test_normalised_scores_do_not_depend_on_units():
    kept = []
    for params in (weights(), weights(second=1e-3)):
        for normalize in ("mean", "max"):
            chosen = select(
                two,
                params,
                X,
                scope="global",
                normalize=normalize,
                score=lambda program, p: {
                    c.name: np.linalg.norm(p["a"], axis=0)
                    if c.size == 8
                    else np.linalg.norm(p["c"], axis=1)
                    for c in program.couplings.free
                },
            )
            kept.append([m.tolist() for m in chosen.keep.values()])
    assert kept[0] == kept[2] and kept[1] == kept[3]


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 9), st.integers(1, 16))
def test_widths_are_allowed_and_near(n, size, floor, multiple):
    n = min(n, size)
    allowed = {size} | {k for k in range(multiple, size, multiple) if k >= floor}
    width = Widths(floor, multiple).nearest(n, size)
    assert width in allowed
    assert abs(width - n) == min(abs(k - n) for k in allowed)
    assert Widths(floor, multiple).nearest(size, size) == size


def test_widths_are_rounded_and_have_a_floor():
    params = weights()
    assert widths(shrink(two, params, X, keep=0.3, multiple=4)[1]) == (4, 4)
    assert widths(shrink(two, params, X, keep=0.1, floor=3)[1]) == (3, 3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        shrink(two, params, X, floor=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scope": "all"}, "local"),
        ({"scope": "global", "normalize": "sum"}, "mean, max, none"),
        ({"score": lambda program, p: {}}, "says nothing about coupling"),
        (
            {
                "score": lambda program, p: {
                    c.name: np.full(c.size, np.nan) for c in program.couplings
                }
            },
            "8 not finite",
        ),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        select(two, weights(), X, **options)


# Which couplings a pattern chooses.


def test_what_is_to_be_ignored_keeps_its_shape():
    kept = lambda **o: jax.tree.map(jnp.shape, shrink(two, weights(), X, **o)[1])
    assert kept(ignore="a") == {"a": (3, 8), "b": (8, 2), "c": (2, 2)}
    assert kept(ignore=["c"], keep=0.25) == {"a": (3, 2), "b": (2, 4), "c": (4, 2)}
    with pytest.raises(ValueError, match="Nearest"):
        kept(ignore="aa")
    with pytest.raises(ValueError, match="nothing in this function can be removed"):
        kept(ignore="b")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.5}, r"got 0.5: write pruning.flops\(0.5\)"),
        ({"budget": [flops]}, "with its limit, got <function flops"),
        ({"score": magnitude}, r"write pruning.magnitude\(2\)"),
        ({"score": lambda loss, batches: magnitude(2)}, "does not: write"),
        ({"score": lambda program, p: None}, "for each coupling, by name"),
        (
            {"score": taylor(two, iter([X]))},
            r"an array of shape \(2, 3\): write",
        ),
        ({"score": activation(iter([X]))}, r"an array of shape \(2, 3\): write"),
    ],
)
def test_what_is_no_score_and_no_budget_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        select(two, weights(), X, **options)


def test_a_function_without_inputs_says_how_to_give_them():
    with pytest.raises(ValueError, match=r"select\(fn, params, x\).*functional"):
        select(two, weights())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": {}}, "names no pattern"),
        ({"keep": {"a": 0.5}}, r"also holds b[;.]"),
        ({"keep": {"**": 0.5, "{a,b}": 0.2}}, "comes too late"),
        ({"keep": {"x": 0.5}}, "Nearest"),
        ({"keep": "0.5"}, r"in \[0, 1\], got '0.5'"),
        ({"keep": True}, r"in \[0, 1\], got True"),
    ],
)
def test_a_pattern_that_does_nothing_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        select(two, weights(), X, **options)


def test_a_typo_is_told_even_where_nothing_could_go():
    with pytest.raises(ValueError, match="Nearest: w"):
        select(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, X, keep={"v": 0.5})


def test_what_the_function_does_not_use_is_named():
    fn = lambda p, x: jnp.tanh(x @ p["a"] * jnp.ones((1, 8))) @ p["b"] @ p["c"]
    used = lambda p, x: jnp.tanh(x @ p["a"] + p["mean"][None]) @ p["b"] @ p["c"]
    params = {**weights(), "mean": jnp.ones(8)}
    couplings = trace(fn, params, X).couplings
    (c,) = [c for c in couplings if ("mean", 0) in c.members]
    assert c.frozen and "does not use mean: trace one that does" in c.reason
    couplings = trace(used, params, X).couplings
    assert ("mean", 0) in next(c for c in couplings.free if c.size == 8).members


# Budgets.


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_budget_is_kept_and_hardly_undercut(scope, getkey):
    model, params, x = resnet(getkey())
    whole = trace(model.apply, params, x).costs.flops
    chosen = select(model.apply, params, x, budget=flops(0.5), scope=scope)
    small_fn, small = chosen.resize(model.apply), chosen.take(params)
    now = trace(small_fn, small, x).costs.flops
    assert now <= 0.5 * whole
    enough = min(t.amount for t in chosen.trials if t.met)
    assert max(t.amount for t in chosen.trials if not t.met) < enough
    assert close(small_fn(small, x), model.apply(chosen.zeroed(params), x))
    assert "FLOPs" in str(chosen) and "(no)" in str(chosen)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_no_coupling_has_room_for_more(scope, getkey):
    model, params, x = resnet(getkey())
    limit = 0.5 * trace(model.apply, params, x).costs.flops
    chosen = select(model.apply, params, x, budget=flops(0.5), scope=scope, multiple=2)
    back = [t for t in chosen.trials if t.back]
    assert chosen.trials[-1].figures["FLOPs"] <= limit
    if back:
        assert f"room for {back[-1].back[1]} more of {back[-1].back[0]}" in str(chosen)

    def cost(keep):
        more = dataclasses.replace(chosen, keep=keep)
        small = more.take(params)
        return trace(more.resize(model.apply), small, x).costs.flops

    assert cost(chosen.keep) <= limit
    for name, mask in chosen.keep.items():
        assert mask.sum() % 2 == 0 or mask.all()
        if not mask.all():
            more = mask.copy()
            more[np.flatnonzero(~mask)[:2]] = True
            assert cost({**chosen.keep, name: more}) > limit


def test_several_budgets_are_all_kept():
    params = weights()
    chosen = select(two, params, X, budget=[flops(0.5), parameters(20)])
    small = chosen.take(params)
    assert tree.tree_size(small) <= 20
    assert (
        trace(chosen.resize(two), small, X).costs.flops
        <= trace(two, params, X).costs.flops / 2
    )


def test_room_is_given_back_before_budgets_exclude_each_other():
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((8, 2))}
    whole = trace(two, params, X).costs.flops
    share = lambda fn, params, args: trace(fn, params, *args).costs.flops / whole
    # Both couplings halved at once are 35 %, either of them alone 58 or 62 %.
    budgets = [flops(0.7), Budget("share", share, at_least=0.5)]
    chosen = select(two, params, X, budget=budgets, multiple=4)
    now = share(chosen.resize(two), chosen.take(params), (X,))
    assert 0.5 <= now <= 0.7
    assert chosen.trials[-1].figures == {"FLOPs": now * whole, "share": now}


def test_the_numbers_of_a_compressed_model_are_those_it_stands_for():
    kept = []
    for fn, params in (
        (two, weights()),
        quantize(two, weights(), X, formats=int4),
    ):
        chosen = select(fn, params, X, budget=parameters(0.5), score=random())
        kept.append([m.tolist() for m in chosen.keep.values()])
    assert kept[0] == kept[1]


def test_a_smallest_step_that_is_too_much_is_an_error():
    params = {"a": jnp.ones((3, 10)), "b": jnp.ones((10, 4)), "c": jnp.ones((4, 2))}
    width = lambda fn, params, args: params["a"].shape[1]
    options = {"keep": {"{a,b}": 0.0}, "multiple": 8}
    with pytest.raises(ValueError, match=r"nothing may leave: .* width 8 \(limit 10\)"):
        select(two, params, X, budget=Budget("width", width, at_least=10), **options)


def with_idle():
    """Half of the first layer's neurons hardly matter."""
    params = weights()
    return {**params, "b": params["b"] * jnp.where(jnp.arange(8) < 4, 1, 1e-4)[:, None]}


def fidelity(least):
    """How much of the norm of the outputs is left, as a user would measure it."""
    params = with_idle()
    whole = two(params, X)

    def measure(fn, params, args):
        off = jnp.linalg.norm(fn(params, *args) - whole) / jnp.linalg.norm(whole)
        return 1 - float(off)

    return Budget("fidelity", measure, at_least=least)


def test_as_much_leaves_as_what_must_be_reached_allows():
    params = with_idle()
    chosen = select(two, params, X, keep={"{a,b}": 0.1}, budget=fidelity(0.99))
    reached = [t.figures["fidelity"] for t in chosen.trials]
    now = fidelity(0.99).measure(chosen.resize(two), chosen.take(params), (X,))
    assert now >= 0.99 and chosen.removed >= 2 and min(reached) < 0.99


@pytest.mark.parametrize(
    "budget, message",
    [
        (lambda: parameters(10**6), "within its budget as it is"),
        (lambda: parameters(3), "even the least that may stay is too much"),
        (lambda: fidelity(1.5), "does not reach what it must"),
        (lambda: [parameters(0.2), fidelity(0.99)], "exclude each other"),
        (lambda: [fidelity(0.5), fidelity(0.9)], "more than one is called 'fidelity'"),
        (lambda: flops(0), "above 1, got 0"),
        (lambda: Budget("x", lambda *a: 1.0), "one limit"),
    ],
)
def test_budgets_that_cannot_be_are_one_clear_line(budget, message):
    with pytest.raises(ValueError, match=message):
        select(two, weights(), X, budget=budget())


# What is not exact, by name.


def centred(p, x):
    """A two-pass norm: zeros are not zero any more once the mean is taken off."""
    h = x @ p["a"]
    h = h - h.mean(1, keepdims=True)
    return h / jnp.sqrt(0.1 + (h**2).mean(1, keepdims=True)) @ p["b"] @ p["c"]


def test_what_is_not_exact_has_to_be_asked_for_and_tells_its_error():
    params, x = weights(), jr.normal(jr.key(1), (2, 3))
    c = next(c for c in trace(centred, params, x).couplings if c.size == 8)
    assert c.frozen and c.inexact and "not zero" in c.reason
    with pytest.raises(ValueError, match="frozen|not zero"):
        select(centred, params, x, keep={"{a,b}": 0.5})
    chosen = select(centred, params, x, keep={"{a,b}": 0.5}, approximate="{a,b}")
    small = chosen.take(params)
    assert small["a"].shape == (3, 4)
    got = chosen.resize(centred)(small, x)
    want = centred(chosen.zeroed(params), x)
    off = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert chosen.error is not None and chosen.error > 0
    assert np.isclose(chosen.error, off, rtol=1e-3)
    assert "not exact" in str(chosen)
    with pytest.raises(ValueError, match="frozen for exactness alone"):
        select(two, params, x, approximate="a")


# Whole blocks.


@pytest.mark.slow
def test_a_residual_block_can_leave_altogether(getkey):
    model, params, x = resnet(getkey())
    inner = "params/stage1_block0/conv{1,2}/*"
    couplings = trace(model.apply, params, x).couplings
    paths = [p for c in couplings.free for p, _ in c.members if "stage1_block0" in p]
    conv = next(p for p in paths if p.endswith("conv1/kernel"))
    fn, small = shrink(model.apply, params, x, keep={inner: 0.0})
    assert 0 in tree.paths(small)[conv].shape
    chosen = select(model.apply, params, x, keep={inner: 0.0})
    y = jr.normal(getkey(), (3, 8, 8, 3))
    assert close(jax.jit(fn)(small, y), model.apply(chosen.zeroed(params), y))
    grads = jax.grad(lambda p: fn(p, y).sum())(small)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_chain_cannot_lose_a_layer():
    with pytest.raises(ValueError, match="no output depends on the inputs"):
        select(two, weights(), X, keep=0)


# What else there is for each weight.


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adamw(1e-2),
        lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
        lambda: optax.masked(optax.adam(1e-2), {"a": True, "b": True, "c": False}),
    ],
    ids=["adamw", "sgd", "clip and lion", "adafactor", "masked"],
)
def test_training_goes_on_with_the_state_of_what_stays(make):
    tx, params = make(), weights()
    step = lambda fn: jax.jit(
        lambda p, s: tx.update(jax.grad(lambda p: jnp.sin(fn(p, X)).sum())(p), s, p)
    )
    state = tx.init(params)
    for _ in range(3):
        updates, state = step(two)(params, state)
        params = optax.apply_updates(params, updates)
    chosen = select(two, params, X, keep=0.75)
    small, small_state = chosen.take(params), chosen.take_state(state)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(
        jnp.shape, tx.init(small)
    )
    updates, after = step(chosen.resize(two))(small, small_state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, small_state)
    first = lambda s: [x for x in jax.tree.leaves(s) if x.ndim == 0]
    assert all(map(jnp.array_equal, first(state), first(small_state)))
    mu = tree.paths(state).get("0/mu/a")
    if mu is not None:
        (mask,) = (m for m in chosen.keep.values() if m.size == 8)
        kept = tree.paths(small_state)["0/mu/a"]
        assert jnp.array_equal(kept, mu[:, mask])


def test_a_state_whose_dims_cannot_be_told_is_an_error():
    params = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 2))}
    chosen = select(two, params, X, keep={"{a,b}": 0.5})
    with pytest.raises(ValueError, match="could be several"):
        chosen.take_state({"row": {"b": jnp.ones(6)}})
    with pytest.raises(ValueError, match="are not among"):
        chosen.take_state({"b": jnp.ones(5)})
    same = {"row": {"other": jnp.arange(6.0)}, "b": jnp.ones(1)}
    assert jax.tree.all(jax.tree.map(np.array_equal, chosen.take_state(same), same))


def test_the_state_of_a_part_of_the_weights_is_cut_too():
    # Outside and inside of the block weights have the same names and shapes.
    fn = lambda p, x: two(
        p["params"]["block"], two(p["params"], x) @ p["params"]["last"]
    )
    inner = {**weights(), "last": jnp.ones((2, 3))}
    params = {"params": {**inner, "block": weights()}, "stats": {"mean": jnp.ones(2)}}
    params = jax.tree.map(lambda w: w + jr.normal(jr.key(w.size), w.shape), params)
    tx = optax.adam(1e-3)
    chosen = select(fn, params, X, keep={"params/{a,b}": 0.25, "params/block/**": 0.5})
    small = chosen.take(params)
    full = tx.update(params, tx.init(params), params)[1]
    want = chosen.take_state(full)[0].mu["params"]
    part = params["params"]
    cut = chosen.take_state(tx.update(part, tx.init(part), part)[1])
    tx.update(small["params"], cut, small["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, cut[0].mu, want))
    with pytest.raises(ValueError, match="could be of params/a or params/block/a"):
        chosen.take_state(tx.init(part["block"]))


def test_weights_that_were_not_chosen_from_are_refused():
    params = {"params": weights()}
    chosen = select(lambda p, x: two(p["params"], x), params, X)
    for wrong, message in [
        (params["params"], "there is no params/a among a, b, c"),
        (chosen.take(params), r"params/a loses indices of \(3, 8\), .* taken before"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen.take(wrong)
    with pytest.raises(ValueError, match="none of the 1 arrays here, other among them"):
        chosen.take_state({"other": jnp.ones(3)})
    twice = {"0": {"a": jnp.ones((3, 8))}}
    twin = {"x": weights(), "y": weights()}
    chosen = select(lambda p, x: two(p["x"], x) + two(p["y"], x), twin, X)
    with pytest.raises(ValueError, match="0/a could be of x/a or y/a"):
        chosen.take_state(twice)


def test_compressed_weights_are_zeroed_dense():
    fn, params = quantize(two, weights(), X)
    chosen = select(fn, params, X, keep=0.5)
    small = chosen.resize(fn)(chosen.take(params), X)
    assert close(small, two(chosen.zeroed(params), X))


def test_scores_may_be_complex_or_below_zero():
    a = jnp.where(jnp.arange(8)[None] < 4, 3j, 1.0 + 1j) * jnp.ones((3, 1))
    params = {"a": a, "b": jnp.ones((8, 4), a.dtype), "c": jnp.ones((4, 2), a.dtype)}
    fn = lambda p, x: jnp.abs(two(p, x))
    for score in (magnitude(1), magnitude(2)):
        chosen = select(fn, params, X, keep={"{a,b}": 0.5}, score=score)
        (mask,) = chosen.keep.values()
        assert mask.tolist() == [True] * 4 + [False] * 4
    below = lambda program, p: {
        c.name: -1.0 - np.arange(c.size) for c in program.couplings
    }
    chosen = select(two, weights(), X, score=below, scope="global")
    # In units of their means (4.5 and 2.5) the second's come after the first's.
    assert [int(m.sum()) for m in chosen.keep.values()] == [4, 2]


def test_a_selection_fits_any_function_of_the_same_weights(getkey):
    model, x = CNN(stages=((8,), (8,)), classes=5), jr.normal(getkey(), (4, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    train = lambda p, x: model.apply(p, x, train=True, mutable=["batch_stats"])
    chosen = select(model.apply, params, x)
    small = chosen.take(params)
    one = chosen.resize(train)(small, x)
    other = like(chosen.resize(model.apply), train)(small, x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, other))


def test_the_report_names_what_leaves_and_why_the_rest_stays():
    said = str(select(two, weights(), X, keep={"{a,b}": 0.5}))
    assert "a and 1 more" in said and "8" in said and "not chosen" in said
    assert "frozen: it is a dim of the outputs" in said
