"""The shrunk function equals the original with the removed indices zeroed."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from jaxeff import lift, models, resize, trace, tree
from jaxeff.program import keep_indices, like, make_plan, Plan, zero_indices
from tests.program.built import build, some, zoo
from tests.program.leaves import compress, Scaled, Shy
from tests.program.shrinking import distance, random_keep, shrunk
from tests.zoo import draw, ZOO

# Compiling is most of the time, and the numbers need no optimisation.
# Of this module, what takes longer than 5 s.
SLOW = {
    "test_gradients_of_what_is_kept_are_those_of_the_masked_function[nnx_transformer]",
}

QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def another_batch(args, seed):
    """The inputs of a model, repeated in another order: another batch size."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 6))
    return jax.tree.map(lambda x: x[rng.integers(0, x.shape[0], n)], args)


@zoo
def test_shrunk_equals_masked_at_another_batch_size(case):
    model = build(case)
    rng = np.random.default_rng(sum(map(ord, case.name)))
    couplings = model.program.couplings
    keep = random_keep(couplings, rng, rng.choice([0.2, 0.5, 0.8]))
    fn, small = shrunk(model.fn, model.params, couplings, keep)
    args = another_batch(model.args, 0)
    want = jit(model.fn)(zero_indices(model.params, couplings, keep), *args)
    got = jit(fn)(small, *args)
    assert distance(got, want) < 1e-5
    if case.name != "plain_control_flow":
        assert sum(x.size for x in jax.tree.leaves(small)) < sum(
            x.size for x in jax.tree.leaves(model.params)
        )


SMALL = models.LlamaConfig(17, d_model=8, hidden=12, n_layers=2, n_heads=2)
MODELS = {
    "mlp": (models.MLP((6, 4), 3), (2, 5)),
    "cnn": (models.CNN(((4, 6), (6, 4)), 3), (2, 8, 8, 1)),
    "mobilenet": (models.MobileNet(3, layout=((8, 1), (10, 2), (12, 1))), (2, 8, 8, 3)),
    "resnet": (models.ResNet(14, 4, 3), (2, 8, 8, 3)),
    "gpt": (models.GPT(17, 8, 8, 1, 2), (2, 5)),
    "llama": (models.Llama(SMALL), (2, 5)),
}


def built(name):
    """A model of `jaxeff.models` with random weights, on shapes of inputs."""
    model, shape = MODELS[name]
    tokens = name in ("gpt", "llama")
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)
    params = draw(jr.key(1), jax.eval_shape(model.init, jr.key(0), x))
    return model, jax.tree.map(np.asarray, params), x


def batch(x, n, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, *x.shape[1:])
    if x.dtype == jnp.int32:
        return rng.integers(0, 17, shape).astype(x.dtype)
    return rng.normal(size=shape).astype(x.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_one_index_of_each_coupling_is_enough(name):
    """Every dim of size 1 now: nothing may take it for a dim to be repeated."""
    model, params, x = built(name)
    couplings = trace(model.apply, params, x).couplings
    keep = {c.name: np.arange(c.size) == c.size // 2 for c in couplings.free}
    fn, small = shrunk(model.apply, params, couplings, keep)
    args = batch(x, 3)
    want = jit(model.apply)(zero_indices(params, couplings, keep), args)
    assert distance(jit(fn)(small, args), want) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt", "llama"))],
)
def test_one_coupling_alone_can_be_shrunk(name):
    model, params, x = built(name)
    couplings = trace(model.apply, params, x).couplings
    args = batch(x, 3)
    apply = jit(model.apply)
    for c in couplings.free:
        keep = {c.name: np.arange(c.size) % 2 == 0}
        fn, small = shrunk(model.apply, params, couplings, keep)
        want = apply(zero_indices(params, couplings, keep), args)
        assert distance(jit(fn)(small, args), want) < 1e-5, c


def mean_square(fn):
    return lambda params, *args: jnp.mean(jnp.square(fn(params, *args)))


GRADIENTS = some(
    "linen_cnn",
    "linen_transformer",
    "linen_llama_scan_remat",
    "nnx_transformer",
    "equinox_cnn",
    "plain_transformer",
    "plain_custom_vjp",
    "plain_lstm",
    "plain_cnn",
)


@GRADIENTS
def test_gradients_of_what_is_kept_are_those_of_the_masked_function(case):
    model = build(case)
    couplings = model.program.couplings
    keep = random_keep(couplings, np.random.default_rng(1))
    fn, small = shrunk(model.fn, model.params, couplings, keep)
    full = zero_indices(model.params, couplings, keep)
    want = jit(jax.grad(mean_square(model.fn)))(full, *model.args)
    got = jit(jax.grad(mean_square(fn)))(small, *model.args)
    assert distance(got, keep_indices(want, couplings, keep)) < 1e-4


@some("linen_llama", "plain_mlp", "equinox_cnn")
def test_shrunk_can_be_batched(case):
    model = build(case)
    couplings = model.program.couplings
    keep = random_keep(couplings, np.random.default_rng(2))
    fn, small = shrunk(model.fn, model.params, couplings, keep)
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), model.args)
    axes = (None, *(0 for _ in twice))
    want = jit(jax.vmap(model.fn, axes))(
        zero_indices(model.params, couplings, keep), *twice
    )
    assert distance(jit(jax.vmap(fn, axes))(small, *twice), want) < 1e-5


def test_weights_can_be_batched_too():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    small_fn, small = shrunk(fn, params, couplings, half(couplings))
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), small)
    got = jax.vmap(small_fn, (0, None))(stacked, x)
    assert distance(got[1], small_fn(jax.tree.map(lambda w: 2 * w, small), x)) < 1e-6


@some("linen_transformer", "plain_cnn", "equinox_transformer")
def test_shrinking_twice_is_masking_twice(case):
    model = build(case)
    couplings = model.program.couplings
    keep = random_keep(couplings, np.random.default_rng(3), 0.8)
    fn, small = shrunk(model.fn, model.params, couplings, keep)
    again = trace(fn, small, *model.args).couplings
    # The same couplings are free, each as large as what was kept.
    left = {c.name: int(keep[c.name].sum()) for c in couplings.free}
    sizes = sorted(n for n in left.values() if n > 1)
    assert sorted(c.size for c in again.free) == sizes
    keep = random_keep(again, np.random.default_rng(4), 0.6)
    fn2, small2 = shrunk(fn, small, again, keep)
    want = jit(fn)(zero_indices(small, again, keep), *model.args)
    assert distance(jit(fn2)(small2, *model.args), want) < 1e-5


# Plans.


def mlp():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]

    shapes = {"a": (5, 8), "b": (8,), "c": (8, 3)}
    keys = jr.split(jr.key(0), 3)
    params = {
        n: jr.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return fn, params, jr.normal(jr.key(1), (4, 5))


def half(couplings):
    return {c.name: np.arange(c.size) % 2 == 0 for c in couplings.free}


def test_only_sizes_matter_not_which_indices():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    first = np.arange(8) < 4
    assert make_plan(couplings, {"c1": first}) == make_plan(couplings, half(couplings))


def test_a_plan_survives_json_and_knows_both_shapes():
    (case,) = (case for case in ZOO if case.name == "plain_transformer")
    model = build(case)  # several couplings in one weight
    couplings = model.program.couplings
    plan = make_plan(couplings, half(couplings))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    small = keep_indices(model.params, couplings, half(couplings))
    before, after = tree.paths(model.params), tree.paths(small)
    for path in plan.dims:
        assert plan.shape(path, new=False) == before[path].shape
        assert plan.shape(path, new=True) == after[path].shape
    assert all(before[p] is after[p] for p in before if p not in plan.dims)


def test_a_plan_that_removes_nothing_is_the_function_itself():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    plan = make_plan(couplings, {"c1": np.ones(8, bool)})
    assert plan == Plan({}, {}) and resize(fn, plan) is fn


def test_shapes_can_lose_indices_like_arrays():
    fn, params, x = mlp()
    shapes = jax.eval_shape(lambda: params)
    couplings = trace(fn, shapes, x).couplings
    small = keep_indices(shapes, couplings, half(couplings))
    assert {n: s.shape for n, s in small.items()} == {
        "a": (5, 4),
        "b": (4,),
        "c": (4, 3),
    }
    assert jax.eval_shape(resize(fn, make_plan(couplings, half(couplings))), small, x)


BAD_PLANS = {
    "unknown": (
        {"c9": np.ones(8, bool)},
        "no coupling 'c9' among 3. Nearest: c2, c1, c0",
    ),
    "frozen": ({"c0": np.arange(5) < 2}, "c0 is frozen: it is a dim of the inputs"),
    "of another length": ({"c1": np.ones(4, bool)}, r"it needs \(8,\)"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_cannot_be_is_an_error(name):
    keep, message = BAD_PLANS[name]
    fn, params, x = mlp()
    with pytest.raises(ValueError, match=message):
        make_plan(trace(fn, params, x).couplings, keep)


def test_weights_of_another_size_are_an_error():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    small_fn, small = shrunk(fn, params, couplings, half(couplings))
    with pytest.raises(
        ValueError, match=re.escape("a has shape (5, 8), but by the plan")
    ):
        small_fn(params, x)
    with pytest.raises(ValueError, match=re.escape("c has shape (3, 3)")):
        small_fn({**small, "c": small["c"][:3]}, x)


def test_a_function_that_needs_the_full_size_is_an_error():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    plan = make_plan(couplings, half(couplings))
    small = keep_indices(params, couplings, half(couplings))
    table = jnp.ones((1, 8))
    needs = {
        "all of the inputs": lambda p, x: jnp.concatenate([x, x], 1)[:, 2:] @ p["c"],
        "a constant": lambda p, x: (x @ p["a"] * table) @ p["c"],
        "a cut": lambda p, x: (x @ p["a"])[:, :3],
        "an order": lambda p, x: x @ p["a"][:, ::-1] @ p["c"],
    }
    for other in needs.values():
        with pytest.raises(ValueError, match="do not fit this function"):
            resize(other, plan)(small, x)


def test_couplings_shrunk_apart_are_not_taken_for_one():
    """Both are 4 of 8, but not the same 4: adding them would mix channels."""

    def apart(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["c"] + jax.nn.relu(x @ p["b"]) @ p["d"]

    def together(p, x):
        return (x @ p["a"] + x @ p["b"]) @ (p["c"] + p["d"])

    keys = jr.split(jr.key(0), 4)
    params = {
        n: jr.normal(k, (5, 8) if n in "ab" else (8, 3))
        for k, n in zip(keys, "abcd", strict=True)
    }
    x = jnp.ones((2, 5))
    couplings = trace(apart, params, x).couplings
    fn, small = shrunk(apart, params, couplings, half(couplings))
    assert len(fn.plan.sizes) == 2
    with pytest.raises(ValueError, match="on its own, to 4 in another"):
        like(fn, together)(small, x)


# Another function of the same weights.


class Net(nn.Module):
    """Batch norm, dropout, a convolution in groups, and a norm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3,))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(jax.nn.relu(x))
        x = nn.Conv(12, (3,), feature_group_count=4)(x)
        x = nn.Dropout(0.5, deterministic=not train)(jax.nn.gelu(x))
        return nn.Dense(3)(nn.RMSNorm()(nn.Dense(6)(x)).mean(1))


def net():
    model, x = Net(), jr.normal(jr.key(2), (4, 5, 3))
    params = draw(jr.key(3), jax.eval_shape(model.init, jr.key(0), x))

    def train(params, x, key):
        return model.apply(
            params, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    couplings = trace(model.apply, params, x).couplings
    keep = random_keep(couplings, np.random.default_rng(5))
    return model, params, x, train, couplings, keep


def test_training_of_a_shrunk_model_updates_the_statistics_of_what_is_kept():
    model, params, x, train, couplings, keep = net()
    fn, small = shrunk(model.apply, params, couplings, keep)
    assert len(couplings.free) >= 4
    train_without = lambda p, x: model.apply(
        p, x, train=True, mutable=["batch_stats"], rngs={"dropout": jr.key(0)}
    )[1]
    got = jit(like(fn, train_without))(small, x)["batch_stats"]
    full = jit(train_without)(zero_indices(params, couplings, keep), x)["batch_stats"]
    full = {**params, "batch_stats": full}
    want = keep_indices(full, couplings, keep)["batch_stats"]
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    # Before any dropout the statistics are those of the masked model.
    assert distance(got, want) < 1e-5


def test_dropout_of_a_shrunk_model_draws_masks_of_its_own_size():
    model, params, x, train, couplings, keep = net()
    fn, small = shrunk(model.apply, params, couplings, keep)
    small_train = like(fn, train)
    outs = [jit(small_train)(small, x, jr.key(k))[0] for k in (0, 0, 1)]
    assert jnp.array_equal(outs[0], outs[1]) and not jnp.array_equal(outs[0], outs[2])
    grads = jit(jax.grad(lambda p: jnp.sum(small_train(p, x, jr.key(0))[0] ** 2)))(
        small
    )
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_like_does_to_another_function_all_that_was_done_to_the_first():
    model, params, x, train, couplings, keep = net()
    fn, small = shrunk(model.apply, params, couplings, keep)
    keep = half(trace(fn, small, x).couplings)
    fn2, small2 = shrunk(fn, small, trace(fn, small, x).couplings, keep)
    leaves = compress(small2, Shy)
    got = like(lift(fn2), train)(leaves, x, jr.key(0))
    want = like(fn2, train)(small2, x, jr.key(0))
    assert distance(got, want) == 0
    assert like(model.apply, train) is train


# Leaves.


def test_leaves_lose_indices_like_arrays():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    leaves = compress(params)
    small = keep_indices(leaves, couplings, half(couplings))
    assert isinstance(small["a"], Scaled) and small["a"].shape == (5, 4)
    plan = make_plan(couplings, half(couplings))
    got = lift(resize(fn, plan))(small, x)
    dense = {n: w.dense() if isinstance(w, Scaled) else w for n, w in leaves.items()}
    want = fn(zero_indices(dense, couplings, half(couplings)), x)
    assert distance(got, want) < 1e-6


def test_a_leaf_that_cannot_lose_indices_says_so():
    fn, params, x = mlp()
    couplings = trace(fn, params, x).couplings
    with pytest.raises(ValueError, match=r"Shy of shape \(5, 8\)\) cannot lose"):
        keep_indices(compress(params, Shy), couplings, half(couplings))


# Functions with derivatives of their own.


@jax.custom_vjp
def rounded(x):
    """Rounds; the gradient goes straight through, and scaled so one can tell."""
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), x), lambda x, g: (3 * g * (jnp.abs(x) < 2),))


@jax.custom_vjp
def rounded_by_head(x):
    """The same by way of a reshape, in a program that also cuts dims."""
    return jnp.round(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)


rounded_by_head.defvjp(
    lambda x: (rounded_by_head(x), None),
    lambda _, g: ((3 * g.reshape(*g.shape[:-1], 2, -1)).reshape(g.shape),),
)


@jax.custom_jvp
def clipped(x, limit):
    return jnp.clip(x, -limit, limit)


@clipped.defjvp
def _clipped_jvp(primals, tangents):
    return clipped(*primals), 5 * tangents[0]


@pytest.mark.parametrize(
    "own",
    [rounded, rounded_by_head, lambda x: clipped(x, 0.5)],
    ids=["rounded", "rounded by head", "clipped"],
)
@pytest.mark.parametrize("inside", ["plain", "scan", "remat"])
def test_a_derivative_of_its_own_is_kept_at_the_smaller_size(own, inside):
    def fn(params, x):
        def layer(x, w):
            y = own(x @ params["a"]).reshape(*x.shape[:-1], 2, 4)
            y = jnp.tanh(y).reshape(*x.shape[:-1], 8) @ params["c"]
            return x + y * w, None

        if inside == "remat":
            layer = jax.checkpoint(layer)
        if inside == "scan":
            x = lax.scan(layer, x, jnp.arange(2.0))[0]
        else:
            x = layer(x, 1.0)[0]
        return x @ params["head"]

    keys = jr.split(jr.key(6), 3)
    shapes = {"a": (5, 8), "c": (8, 5), "head": (5, 2)}
    params = {
        n: jr.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    x = jr.normal(jr.key(7), (3, 5))
    couplings = trace(fn, params, x).couplings
    assert sorted(c.size for c in couplings.free) == [2, 4]
    keep = {c.name: np.arange(c.size) != 1 for c in couplings.free}
    small_fn, small = shrunk(fn, params, couplings, keep)
    full = zero_indices(params, couplings, keep)
    want = jit(jax.grad(mean_square(fn)))(full, x)
    got = jit(jax.grad(mean_square(small_fn)))(small, x)
    assert distance(got, keep_indices(want, couplings, keep)) < 1e-5
