import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff import tree
from jaxeff.models import build
from jaxeff.parallelism import (
    audit,
    batch_sharding,
    make_mesh,
    place,
    plan_tensor,
    shard,
)
from tests.parallelism.models import GROUPED, MODELS, near, problem, tokens, WORDS

SLOW = {
    f"{test}[{name}]"
    for test in (
        "test_the_sharded_model_computes_the_same_and_sends_what_the_plan_says",
        "test_gradients_are_those_of_one_device",
    )
    for name in ("bert", "llama scanned", "vit", "resnet20", "mobilenet", "unet")
}
each = pytest.mark.parametrize("name", (*MODELS, "unet"))


@each
def test_the_sharded_model_computes_the_same_and_sends_what_the_plan_says(name):
    fn, params, x = problem(name)
    mesh = make_mesh(tensor=2, data=1, devices=jax.devices()[:2])
    plan = plan_tensor(fn, params, x, devices=2)
    placed = place(params, plan, mesh)
    compiled = jax.jit(fn).lower(placed, x).compile()
    near(compiled(placed, x), fn(params, x))
    found = audit(compiled, mesh)
    # Also of logits that nobody has asked to be whole, nothing is gathered.
    assert found.of("all-reduce", "tensor").bytes == found.bytes == plan.forward


@each
def test_gradients_are_those_of_one_device(name):
    fn, params, x = problem(name)
    # And 4 parts of the batch, where XLA can: it gets depthwise kernels wrong.
    data = 1 if name == "mobilenet" else 4
    mesh = make_mesh(tensor=2, data=data, devices=jax.devices()[: 2 * data])
    of_fn, placed = shard(fn, params, x, mesh=mesh)
    loss = lambda fn: lambda params, x: jnp.sin(fn(params, x)).mean()
    spread = jax.device_put(x, batch_sharding(mesh, len(x)))
    got = jax.jit(jax.value_and_grad(loss(of_fn), allow_int=True))(placed, spread)
    want = jax.jit(jax.value_and_grad(loss(fn), allow_int=True))(params, x)
    near(got, want)


# What Megatron splits: columns of the first kernels of a block, with their biases, and
# rows of the second; the vocabulary.
COLUMNS, ROWS, VECTOR = P(None, "tensor"), P("tensor", None), P("tensor")
BY_HAND = {
    "gpt": {
        "params/embed/embedding": ROWS,
        "params/layer_*/attn/{q,k,v}/kernel": COLUMNS,
        "params/layer_*/attn/{q,k,v}/bias": VECTOR,
        "params/layer_*/attn/o/kernel": ROWS,
        "params/layer_*/up/kernel": COLUMNS,
        "params/layer_*/up/bias": VECTOR,
        "params/layer_*/down/kernel": ROWS,
    },
    "llama": {
        "params/embed/embedding": ROWS,
        "params/head/kernel": COLUMNS,
        "params/layer_*/attn/{q,k,v}/kernel": COLUMNS,
        "params/layer_*/attn/o/kernel": ROWS,
        "params/layer_*/{gate,up}/kernel": COLUMNS,
        "params/layer_*/down/kernel": ROWS,
    },
    "bert": {
        "params/embed/embedding": ROWS,
        "params/bias": VECTOR,
        "params/layer_*/attn/{query,key,value}/kernel": P(None, "tensor", None),
        "params/layer_*/attn/{query,key,value}/bias": ROWS,
        "params/layer_*/attn/out/kernel": P("tensor", None, None),
        "params/layer_*/up/kernel": COLUMNS,
        "params/layer_*/up/bias": VECTOR,
        "params/layer_*/down/kernel": ROWS,
    },
    "vit": {
        "params/head/kernel": COLUMNS,
        "params/head/bias": VECTOR,
        "params/layer_*/attn/{query,key,value}/kernel": P(None, "tensor", None),
        "params/layer_*/attn/{query,key,value}/bias": ROWS,
        "params/layer_*/attn/out/kernel": P("tensor", None, None),
        "params/layer_*/up/kernel": COLUMNS,
        "params/layer_*/up/bias": VECTOR,
        "params/layer_*/down/kernel": ROWS,
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_it_is_the_plan_that_was_written_by_hand(name):
    fn, params, x = problem(name)
    # In models so small the tables of positions are as large as that of the words.
    plan = plan_tensor(fn, params, x[:1], devices=2, whole=POSITIONS.get(name, ()))
    want = {}
    for pattern, spec in BY_HAND[name].items():
        want |= dict.fromkeys(tree.match(pattern, tree.paths(params)), spec)
    split = {path: spec for path, spec in plan.specs.items() if any(spec)}
    assert split == want


POSITIONS = {
    "gpt": "params/position/embedding",
    "bert": "params/{position,type}/embedding",
}


def test_positions_of_the_data_are_not_split_instead_of_heads():
    table = jr.normal(jr.key(5), (16, WORDS["d_model"]))
    model, params, x = problem("gpt")

    def fn(params, x):
        # A weight of its own, with the positions of the batch as a dim.
        return model(params["model"], x) * params["table"].mean(1)[None, :, None]

    plan = plan_tensor(fn, {"model": params, "table": table}, x, devices=2)
    assert not any(plan.specs["table"])
    assert plan.specs["model/params/layer_0/attn/q/kernel"] == COLUMNS
    assert "the data have it, and are not split" in str(plan)


def test_a_large_table_of_few_positions_stays_whole():
    model = build("gpt", **{**WORDS, "vocab_size": 4096}, max_len=32)
    params = jax.eval_shape(model.init, jr.key(0), tokens())
    plan = plan_tensor(model.apply, params, tokens(), devices=2)
    assert not any(plan.specs["params/position/embedding"])
    assert "stores little, and is in no product" in str(plan)


def test_a_block_sends_one_activation_each_way_for_each_half():
    fn, params, x = problem("gpt")
    plan = plan_tensor(fn, params, x, devices=2)
    activation = x.size * WORDS["d_model"] * 4
    of = lambda path: next(s for s in plan.chosen if (path, 1) in s.members)
    for path in ("params/layer_0/attn/q/kernel", "params/layer_1/up/kernel"):
        assert (of(path).forward, of(path).backward) == (activation, activation)


def test_weights_can_be_kept_whole():
    fn, params, x = problem("gpt")
    plan = plan_tensor(fn, params, x, devices=2, whole="params/layer_0/**")
    split = [path for path, spec in plan.specs.items() if any(spec)]
    assert split and not any("layer_0" in path for path in split)
    with pytest.raises(ValueError, match="matches none of the"):
        plan_tensor(fn, params, x, devices=2, whole="params/nothing/**")


def test_heads_that_do_not_divide_stay_whole_and_the_rest_is_split():
    fn, params, x = problem("gpt")
    plan = plan_tensor(fn, params, x, devices=8)
    assert not any(plan.specs["params/layer_0/attn/q/kernel"])
    assert plan.specs["params/layer_0/up/kernel"] == COLUMNS
    assert "4 does not divide by 8" in str(plan)


def test_a_mesh_without_the_axis_is_an_error():
    fn, params, x = problem("gpt")
    with pytest.raises(ValueError, match="axes data, and none is called tensor"):
        shard(fn, params, x, mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(ValueError, match="1 device or more share each layer, got 0"):
        plan_tensor(fn, params, x, devices=0)


def test_where_nothing_can_be_split_it_says_why():
    fn, params, x = problem("gpt")
    with pytest.raises(ValueError, match="among 7 devices(.|\n)* not divide by 7"):
        plan_tensor(fn, params, x, devices=7)


def test_what_goes_along_a_dim_keeps_it_whole():
    def fn(w, x):
        return jnp.cumsum(x @ w["in"], -1) @ w["out"]

    params = {"in": jnp.ones((8, 12)), "out": jnp.ones((12, 6))}
    plan = plan_tensor(fn, params, jnp.ones((2, 8)), devices=2)
    assert plan.specs["in"][1] is None and plan.specs["out"] == COLUMNS
    assert "`cumsum` goes along it" in str(plan)


def test_what_goes_along_another_dim_hinders_nothing():
    def fn(w, x):
        return jnp.cumsum(x @ w["in"], 0) @ w["out"]

    params = {"in": jnp.ones((8, 12)), "out": jnp.ones((12, 6))}
    plan = plan_tensor(fn, params, jnp.ones((2, 8)), devices=2)
    assert (plan.specs["in"], plan.specs["out"]) == (COLUMNS, ROWS)


def test_what_is_put_side_by_side_is_not_split():
    def fn(w, x):
        h = jnp.concatenate([x @ w["a"], x @ w["b"]], -1)
        return jax.nn.relu(h @ w["up"]) @ w["down"]

    shapes = {"a": (8, 12), "b": (8, 12), "up": (24, 16), "down": (16, 6)}
    params = {name: jnp.ones(s) for name, s in shapes.items()}
    plan = plan_tensor(fn, params, jnp.ones((2, 8)), devices=2)
    assert plan.specs["a"][1] is None and "`concatenate` goes along it" in str(plan)
    assert (plan.specs["up"], plan.specs["down"]) == (COLUMNS, ROWS)


def test_what_nobody_asked_for_costs_nothing():
    def fn(w, x):
        h = x @ w["in"]
        h.sum(-1)
        return h @ w["out"]

    params = {"in": jnp.ones((8, 12)), "out": jnp.ones((12, 6))}
    plan = plan_tensor(fn, params, jnp.ones((2, 8)), devices=2)
    assert plan.forward == 2 * 6 * 4


def test_a_plan_for_other_weights_is_an_error():
    fn, params, x = problem("gpt")
    plan = plan_tensor(fn, params, x, devices=2)
    with pytest.raises(ValueError, match="the plan is for other weights"):
        place({"other": jnp.ones(2)}, plan, make_mesh(tensor=2))
    with pytest.raises(ValueError, match="matches none of the"):
        shard(fn, params, x, mesh=make_mesh(), whole="params/typo")


def test_one_device_holds_all():
    fn, params, x = problem("gpt")
    of_fn, placed = shard(fn, params, x, mesh=make_mesh())
    assert of_fn is fn
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(placed))


def test_shapes_are_enough():
    model = build("llama", **GROUPED, scan=True)
    params = jax.eval_shape(model.init, jr.key(0), tokens())
    plan = plan_tensor(model.apply, params, tokens(), devices=2)
    assert plan.specs["params/layers/down/kernel"] == P(None, "tensor", None)
