"""Structured pruning: the smaller function is the original with channels zeroed."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.models import CNN, GPT, Llama, LlamaConfig, MobileNet, ResNet
from jaxeff.program import dense, like
from jaxeff.pruning import Budget, parameters, select, shrink, shrink_in_rounds
from jaxeff.quantization import quantize
from tests.zoo import draw, ZOO

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_gradients_of_the_shrunk_are_those_of_the_masked_where_it_kept[equinox_cnn]",
    "test_gradients_of_the_shrunk_are_those_of_the_masked_where_it_kept[linen_cnn]",
}

LLAMA = LlamaConfig(32, 16, 24, 2, 4, 2)


def masked(fn, params, args, **options):
    """The weights with what `shrink` removes set to zero."""
    return select(fn, params, *args, **options).zeroed(params)


MODELS = {
    "cnn": (CNN(stages=((6, 6), (8,)), classes=5), (2, 8, 8, 1)),
    "mobilenet": (MobileNet(classes=5, width=0.125), (2, 32, 32, 3)),
    "resnet": (ResNet(depth=8, width=4, classes=5), (2, 16, 16, 3)),
    "gpt": (GPT(32, 16, 16, 2, 4), None),
    "llama": (Llama(LLAMA), None),
    "llama scanned": (Llama(LLAMA, scan=True), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_shrunk_model_equals_the_masked_one_at_any_batch_size(name, getkey):
    model, shape = MODELS[name]
    inputs = lambda n: (
        jr.randint(getkey(), (n, 7 + n), 0, 32)
        if shape is None
        else jr.normal(getkey(), (n, *shape[1:]))
    )
    x = inputs(2)
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    fn, small = shrink(model.apply, params, x, keep=0.5)
    zeroed = masked(model.apply, params, (x,))
    assert tree.tree_size(small) < 0.6 * tree.tree_size(params)
    y = inputs(3)
    expected, got = jax.jit(model.apply)(zeroed, y), jax.jit(fn)(small, y)
    assert jnp.allclose(got, expected, rtol=1e-4, atol=1e-4 * jnp.abs(expected).max())


@pytest.mark.parametrize("name", ["linen_cnn", "nnx_mlp", "equinox_cnn", "plain_mlp"])
def test_gradients_of_the_shrunk_are_those_of_the_masked_where_it_kept(name, getkey):
    case = next(c for c in ZOO if c.name == name)
    fn, params, args = case.build(getkey())
    small_fn, small = shrink(fn, params, *args, keep=0.5)
    chosen = select(fn, params, *args)
    loss = lambda f: (
        lambda p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(p, *args)))
    )
    grads = jax.jit(jax.grad(loss(small_fn), allow_int=True))(small)
    full = jax.jit(jax.grad(loss(fn), allow_int=True))(chosen.zeroed(params))
    for path, g in tree.paths(grads).items():
        kept = tree.paths(full)[path]
        for d, mask in enumerate(chosen.couplings.masks(path, chosen.keep)):
            kept = jnp.compress(mask, kept, axis=d)
        assert jnp.allclose(g, kept, rtol=1e-3, atol=1e-5), path


def test_the_best_scored_stay_and_a_users_own_score_decides(getkey):
    model = CNN(stages=((4,), (6,)), classes=5)
    x = jnp.ones((1, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))

    def first_channels(program, params):
        return {c.name: -np.arange(c.size) for c in program.couplings}

    _, small = shrink(model.apply, params, x, keep=0.5, score=first_channels)
    kernel = params["params"]["conv_0_0"]["kernel"]
    assert jnp.array_equal(small["params"]["conv_0_0"]["kernel"], kernel[..., :2])


def test_patterns_choose_couplings_and_leave_the_others_whole(getkey):
    model = GPT(32, 16, 16, 2, 4)
    x = jnp.zeros((1, 8), jnp.int32)
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    keep = {"**/block_0/{up,down}/*": 0.25, "**/{up,down}/*": 0.5}
    paths = list(tree.paths(params))
    block = next(p for p in paths if p.endswith("/up/kernel")).split("/")[1]
    keep = {k.replace("block_0", block): v for k, v in keep.items()}
    fn, small = shrink(model.apply, params, x, keep=keep)
    shapes = {p: w.shape for p, w in tree.paths(small).items()}
    ups = [shapes[p][1] for p in paths if p.endswith("/up/kernel")]
    assert ups == [16, 32]  # of 64
    same = [p for p in paths if "/up/" not in p and "/down/kernel" not in p]
    assert all(shapes[p] == tree.paths(params)[p].shape for p in same)
    assert jnp.all(jnp.isfinite(fn(small, x)))


def test_shrinking_a_quantized_model_slices_its_integers(getkey):
    model = CNN(stages=((8,), (8,)), classes=5)
    x = jr.normal(getkey(), (2, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    q_fn, q = quantize(model.apply, params, x)
    fn, small = shrink(q_fn, q, x, keep=0.5)
    zeroed = masked(model.apply, dense(q), (x,))
    assert tree.tree_bytes(small) < 0.6 * tree.tree_bytes(q)
    assert jnp.allclose(fn(small, x), model.apply(zeroed, x), rtol=1e-3, atol=1e-4)


def test_dropout_and_batch_statistics_follow_the_shrunk_model(getkey):
    model = CNN(stages=((8,), (8,)), classes=5)
    x = jr.normal(getkey(), (4, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    fn, small = shrink(model.apply, params, x, keep=0.5)
    train = lambda p, x: model.apply(p, x, train=True, mutable=["batch_stats"])
    _, updates = jax.jit(like(fn, train))(small, x)
    shapes = lambda t: jax.tree.map(jnp.shape, t)
    assert shapes(updates["batch_stats"]) == shapes(small["batch_stats"])

    def dropped(p, x, key):
        y = model.apply(p, x)
        return jnp.where(jr.bernoulli(key, 0.5, y.shape), y, 0)

    assert like(fn, dropped)(small, x, getkey()).shape == (4, 5)


@pytest.mark.parametrize("keep", [-0.5, 1.5, {"**": 2.0}])
def test_a_fraction_outside_zero_to_one_is_refused(keep):
    fn, params, x = mlp()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        shrink(fn, params, x, keep=keep)


def test_a_pattern_that_chooses_nothing_says_what_stands_against_it(getkey):
    model = CNN(stages=((4,), (6,)), classes=5)
    x = jnp.ones((1, 8, 8, 1))
    params = draw(getkey(), jax.eval_shape(model.init, jr.key(0), x))
    with pytest.raises(ValueError, match="outputs"):
        shrink(model.apply, params, x, keep={"params/head/bias": 0.5})
    with pytest.raises(ValueError, match="Nearest"):
        shrink(model.apply, params, x, keep={"params/haed/*": 0.5})


def test_a_function_of_which_nothing_can_go_is_refused():
    linear = lambda w, x: x @ w
    with pytest.raises(ValueError, match="nothing in this function can be removed"):
        shrink(linear, jnp.ones((3, 2)), jnp.ones((1, 3)))


def mlp():
    keys = jr.split(jr.key(0), 2)
    params = {"a": jr.normal(keys[0], (3, 6)), "b": jr.normal(keys[1], (6, 2))}
    return lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3))


def test_to_remove_nothing_is_an_error():
    fn, params, x = mlp()
    with pytest.raises(ValueError, match=r"nothing would be removed.*6 indices"):
        shrink(fn, params, x, keep=1.0)
    with pytest.raises(ValueError, match="multiple=8 leave all"):
        shrink(fn, params, x, keep=0.9, multiple=8)


def test_at_least_one_index_of_a_coupling_stays():
    fn, params, x = mlp()
    small_fn, small = shrink(fn, params, x, keep=1e-9)
    assert small["a"].shape == (3, 1) and small_fn(small, x).shape == (1, 2)


def test_among_equals_the_first_stay():
    fn, params, x = mlp()
    params = {"a": jnp.ones((3, 6)) * jnp.arange(3.0)[:, None], "b": jnp.ones((6, 2))}
    (mask,) = select(fn, params, x).keep.values()
    assert mask.tolist() == [True] * 3 + [False] * 3


def test_shapes_have_no_values_to_choose_by():
    fn, params, x = mlp()
    with pytest.raises(ValueError, match="only shapes are given"):
        shrink(fn, jax.eval_shape(lambda: params), x)


def test_rounds_reach_the_same_widths_and_train_in_between():
    fn, params, x = mlp()
    seen = []

    def finetune(n, fn, params):
        seen.append((n, params["a"].shape[1], fn(params, x).shape))
        return {**params, "b": params["b"] * 2}

    small_fn, small = shrink_in_rounds(
        fn, params, x, rounds=3, finetune=finetune, keep=1 / 3
    )
    assert seen == [(0, 4, (1, 2)), (1, 3, (1, 2)), (2, 2, (1, 2))]
    kept = [np.flatnonzero((params["a"] == w[:, None]).all(0)) for w in small["a"].T]
    kept = np.concatenate(kept)
    expected = jax.nn.relu(x @ params["a"][:, kept]) @ (8 * params["b"][kept])
    assert jnp.allclose(small_fn(small, x), expected)


@pytest.mark.parametrize(
    "options, widths",
    [
        # 6 neurons: by the last width alone 3 would be the last from round 2 on.
        ({"rounds": 4, "keep": 0.5}, [5, 4, 4, 3]),
        ({"rounds": 3, "keep": 0.3}, [4, 3, 2]),
        # A round in which nothing can leave yet trains.
        ({"rounds": 4, "keep": 0.5, "multiple": 3}, [6, 3, 3, 3]),
        ({"rounds": 4, "keep": 0.5, "scope": "global"}, [5, 4, 4, 3]),
    ],
)
def test_each_round_keeps_its_part_of_what_there_was_at_first(options, widths):
    fn, params, x = mlp()
    seen = []

    def finetune(n, fn, params):
        seen.append(params["a"].shape[1])
        return params

    shrink_in_rounds(fn, params, x, finetune=finetune, **options)
    assert seen == widths


def test_rounds_come_nearer_to_a_budget_step_by_step():
    fn, params, x = mlp()
    seen, rounds = [], {"rounds": 3, "finetune": lambda n, fn, p: seen.append(p) or p}
    whole = tree.tree_size(params)
    shrink_in_rounds(fn, params, x, budget=parameters(0.3), **rounds)
    sizes = [tree.tree_size(p) for p in seen]
    for n, size in enumerate(sizes):
        assert size <= whole * 0.3 ** ((n + 1) / 3)
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 3
    least = Budget("fidelity", lambda *_: 1.0, at_least=0.5)
    with pytest.raises(ValueError, match="no budget has one"):
        shrink_in_rounds(fn, params, x, budget=least, **rounds)
    with pytest.raises(ValueError, match="within its budget as it is"):
        shrink_in_rounds(fn, params, x, budget=parameters(10**6), **rounds)
    with pytest.raises(ValueError, match="got 50 for"):
        shrink_in_rounds(fn, params, x, keep=50, **rounds)
    with pytest.raises(ValueError, match="it returned None"):
        shrink_in_rounds(fn, params, x, rounds=2, finetune=lambda n, fn, p: None)


def test_couplings_are_found_again_though_others_are_gone():
    # With one index left a dim is no coupling, and those after it are counted anew.
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 16)), "c": jnp.ones((16, 3))}
    seen = []

    def finetune(n, fn, params):
        seen.append(params["b"].shape)
        return params

    x = jnp.ones((1, 4))
    shrink_in_rounds(fn, params, x, rounds=3, finetune=finetune, keep=0.25)
    assert seen == [(1, 10), (1, 6), (1, 4)]


def test_rounds_that_remove_nothing_are_refused_before_any_training():
    fn, params, x = mlp()
    stay = lambda n, fn, params: pytest.fail("it trained")
    with pytest.raises(ValueError, match="nothing would be removed"):
        shrink_in_rounds(fn, params, x, rounds=2, finetune=stay, keep=0.95)


@pytest.mark.parametrize("rounds, keep", [(0, 0.5), (2, 0)])
def test_rounds_that_cannot_be_are_refused(rounds, keep):
    fn, params, x = mlp()
    stay = lambda n, fn, params: params
    with pytest.raises(ValueError, match="at least 1 round"):
        shrink_in_rounds(fn, params, x, rounds=rounds, finetune=stay, keep=keep)
