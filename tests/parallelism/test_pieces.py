"""Kernels that hold several in one: queries, keys and values, gates and values."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jaxeff import parallelism
from jaxeff.parallelism import audit, make_mesh, plan_tensor, shard
from jaxeff.parallelism.pieces import divide, Division, Pieces, Piecewise
from jaxeff.program import dense, lift
from jaxeff.quantization import int8, quantize, quantize_array
from jaxeff.training import load_model, save_model
from tests.parallelism.models import near, ten_steps

HEADS, WIDTH, HIDDEN = 4, 32, 64
SIZE = WIDTH // HEADS


def cut(y):
    """Side by side: GPT-2, and the checkpoints of most."""
    return [a.reshape(*y.shape[:2], HEADS, SIZE) for a in jnp.split(y, 3, -1)]


def indexed(y):
    """The three are a dim."""
    y = y.reshape(*y.shape[:2], 3, HEADS, SIZE)
    return y[:, :, 0], y[:, :, 1], y[:, :, 2]


def turned(y):
    """And it comes first, as in many a vision transformer."""
    three = y.reshape(*y.shape[:2], 3, HEADS, SIZE).transpose(2, 0, 1, 3, 4)
    return three[0], three[1], three[2]


def by_head(y):
    """Each head has its three together: nothing is to be taken apart."""
    return jnp.split(y.reshape(*y.shape[:2], HEADS, 3 * SIZE), 3, -1)


LAYOUTS = {f.__name__: f for f in (cut, indexed, turned, by_head)}


def block(w, x, take):
    q, k, v = take(x @ w["qkv"] + w["bias"][None, None])
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / SIZE**0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    x = x + mixed.reshape(x.shape) @ w["out"]
    gate, up = jnp.split(x @ w["gate_up"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ w["down"]


def weights(key):
    keys = iter(jr.split(key, 4))
    draw = lambda *shape: jr.normal(next(keys), shape) / shape[0] ** 0.5
    return {
        "qkv": draw(WIDTH, 3 * WIDTH),
        "bias": jnp.linspace(-1, 1, 3 * WIDTH),
        "out": draw(WIDTH, WIDTH),
        "gate_up": draw(WIDTH, 2 * HIDDEN),
        "down": draw(HIDDEN, WIDTH),
    }


def unrolled(take):
    def fn(params, x):
        for w in params:
            x = block(w, x, take)
        return x

    return fn, [weights(jr.key(i)) for i in range(2)]


def scanned(take):
    step = jax.checkpoint(lambda x, w: (block(w, x, take), None))
    fn = lambda params, x: jax.lax.scan(step, x, params)[0]
    return fn, jax.vmap(weights)(jr.split(jr.key(0), 2))


X = jr.normal(jr.key(9), (4, 8, WIDTH))
ACTIVATION = X.size * 4
WAYS = {
    **{name: unrolled(take) for name, take in LAYOUTS.items()},
    "scanned": scanned(cut),
}
each = pytest.mark.parametrize("name", WAYS)


def two():
    return make_mesh(tensor=2, data=1, devices=jax.devices()[:2])


@each
def test_a_block_sends_two_activations_and_computes_the_same(name):
    fn, params = WAYS[name]
    mesh = two()
    plan = plan_tensor(fn, params, X, devices=2)
    of_fn, placed = shard(fn, params, X, mesh=mesh)
    compiled = jax.jit(of_fn).lower(placed, X).compile()
    near(compiled(placed, X), fn(params, X))
    found = audit(compiled, mesh)
    assert plan.forward == 2 * 2 * ACTIVATION
    assert found.of("all-reduce", "tensor").bytes == found.bytes == plan.forward
    held = [a.addressable_shards[0].data.size for a in jax.tree.leaves(placed)]
    assert sum(held) == sum(a.size for a in jax.tree.leaves(params)) // 2


@each
def test_ten_steps_are_those_of_one_device(name):
    fn, params = WAYS[name]
    loss = lambda fn: lambda params, x: jnp.sin(fn(params, x)).mean()
    of_fn, placed = shard(fn, params, X, mesh=make_mesh(tensor=2, data=4))
    value, grads, after = ten_steps(loss(of_fn), placed, X)
    near((value, dense(grads), dense(after)), ten_steps(loss(fn), params, X))


def test_fewer_keys_than_queries_are_split_by_groups():
    def fn(w, x):
        y = x @ w["qkv"]
        q, k, v = jnp.split(y, [WIDTH, WIDTH + 2 * SIZE], -1)
        q = q.reshape(*x.shape[:2], 2, 2, SIZE)
        k, v = (a.reshape(*x.shape[:2], 2, SIZE) for a in (k, v))
        scores = jax.nn.softmax(jnp.einsum("btghd,bsgd->bghts", q, k))
        mixed = jnp.einsum("bghts,bsgd->btghd", scores, v)
        return mixed.reshape(x.shape) @ w["out"]

    params = {
        "qkv": jr.normal(jr.key(0), (WIDTH, WIDTH + 4 * SIZE)) / 8,
        "out": jr.normal(jr.key(1), (WIDTH, WIDTH)) / 8,
    }
    plan = plan_tensor(fn, params, X, devices=2)
    sizes = [n for n, _ in plan.pieces["qkv"].pieces]
    assert sizes == [WIDTH, 2 * SIZE, 2 * SIZE] and plan.forward == ACTIVATION
    of_fn, placed = shard(fn, params, X, mesh=two())
    near(jax.jit(of_fn)(placed, X), fn(params, X))


def test_what_stands_beside_and_is_not_split_is_whole():
    def fn(w, x):
        hidden, gate = jnp.split(x @ w["both"], [HIDDEN], -1)
        return (jax.nn.relu(hidden) @ w["down"]) * gate

    draw = lambda i, *shape: jr.normal(jr.key(i), shape) / 8
    params = {"both": draw(0, WIDTH, HIDDEN + 1), "down": draw(1, HIDDEN, WIDTH)}
    plan = plan_tensor(fn, params, X, devices=2)
    assert plan.pieces["both"].pieces == ((HIDDEN, True), (1, False))
    assert "kept in 2 pieces along dim 1 (1: both)" in str(plan)
    of_fn, placed = shard(fn, params, X, mesh=two())
    near(jax.jit(of_fn)(placed, X), fn(params, X))
    assert placed["both"].arrays[1].sharding.is_fully_replicated


def test_convolutions_that_hold_two_are_split():
    def fn(w, x):
        y = jax.lax.conv_general_dilated(
            x, w["both"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        a, b = jnp.split(y, 2, -1)
        return (a * jax.nn.sigmoid(b)) @ w["out"]

    draw = lambda i, *shape: jr.normal(jr.key(i), shape) / 8
    params = {"both": draw(0, 3, WIDTH, 2 * HIDDEN), "out": draw(1, HIDDEN, WIDTH)}
    mesh = two()
    of_fn, placed = shard(fn, params, X, mesh=mesh)
    compiled = jax.jit(of_fn).lower(placed, X).compile()
    near(compiled(placed, X), fn(params, X))
    assert audit(compiled, mesh).bytes == ACTIVATION


def test_what_is_used_as_one_stays_whole_and_says_so():
    def fn(w, x):
        y = x @ w["in"]
        y = jnp.roll(y / jnp.sqrt((y**2).sum(-1, keepdims=True)), 1, 0)
        a, b = jnp.split(y, 2, -1)
        h = (a * b) @ w["out"]
        return jax.nn.relu(h @ w["up"]) @ w["down"]

    draw = lambda i, *shape: jr.normal(jr.key(i), shape) / 8
    params = {
        "in": draw(0, WIDTH, 2 * HIDDEN),
        "out": draw(1, HIDDEN, WIDTH),
        "up": draw(2, WIDTH, HIDDEN),
        "down": draw(3, HIDDEN, WIDTH),
    }
    mesh = two()
    plan = plan_tensor(fn, params, X, devices=2)
    assert not plan.pieces and plan.specs["in"][1] is None and plan.chosen
    assert "beside others, and they are used as one" in str(plan)
    of_fn, placed = shard(fn, params, X, mesh=mesh)
    compiled = jax.jit(of_fn).lower(placed, X).compile()
    near(compiled(placed, X), fn(params, X))
    assert audit(compiled, mesh).bytes == plan.forward


def test_pieces_are_stored_and_come_back(tmp_path):
    fn, params = WAYS["cut"]
    of_fn, placed = shard(fn, params, X, mesh=two())
    save_model(tmp_path / "model", of_fn, placed)
    again, loaded, _ = load_model(tmp_path / "model", fn, params)
    assert isinstance(again, Piecewise)
    near(dense(loaded), params)
    near(again(loaded, X), fn(params, X))


def test_pieces_lie_over_fsdp_too():
    fn, params = WAYS["cut"]
    mesh = make_mesh(tensor=2, fsdp=4)
    loss = lambda params, x: jnp.sin(fn(params, x)).mean()
    of_fn, placed = shard(loss, params, X, mesh=mesh)
    of_fn, placed = parallelism.fully_shard(of_fn, placed, X, mesh=mesh, least=64)
    got = jax.jit(jax.value_and_grad(of_fn))(placed, X)
    want = jax.value_and_grad(loss)(params, X)
    near((got[0], dense(got[1])), want)


@pytest.mark.parametrize("axes", [{"tensor": 2, "data": 4}, {"data": 8}])
def test_shapes_are_placed_as_arrays_are(axes):
    fn, params = WAYS["cut"]
    mesh = make_mesh(**axes)
    _, placed = shard(fn, params, X, mesh=mesh)
    _, planned = shard(fn, jax.eval_shape(lambda: params), X, mesh=mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(planned)
    for array, shape in zip(*map(jax.tree.leaves, (placed, planned)), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert array.sharding == shape.sharding


def test_pieces_that_are_there_already_may_be_joined():
    fn = lambda w, x: jax.nn.relu((x + w["both"].sum()) @ w["up"]) @ w["down"]
    draw = lambda i, *shape: jr.normal(jr.key(i), shape) / 8
    params = {"both": draw(0, 4, 8), "up": draw(1, WIDTH, 64), "down": draw(2, 64, 8)}
    halves = divide(params["both"], Division(1, ((4, True), (4, True)), ""))
    fn_of, placed = shard(Piecewise(fn), params | {"both": halves}, X, mesh=two())
    near(jax.jit(fn_of)(placed, X), fn(params, X))


@each
def test_pieces_are_quantized_as_the_whole_is(name):
    fn, params = WAYS[name]
    of_fn, placed = shard(fn, params, X, mesh=two())
    of_fn, placed = quantize(of_fn, placed, X, formats=int8)
    got = jax.jit(of_fn)(placed, X)
    fn, params = quantize(fn, params, X, formats=int8)
    near(got, fn(params, X))
    near(dense(dense(placed)), dense(params))


VIEWS = {
    "merged": lambda w: w.reshape((12, 24)),
    "split": lambda w: w.reshape((4, 3, 3, 4, 2)),
    "more ones": lambda w: w.reshape((1, 4, 1, 3, 12, 1, 2)),
    "turned": lambda w: w.transpose((2, 0, 1, 3)),
    "narrower": lambda w: w.astype(jnp.bfloat16),
}


@pytest.mark.parametrize("name", ["split", "merged", "turned", "narrower"])
def test_views_of_quantized_pieces_are_those_of_the_array(name):
    w = jr.normal(jr.key(0), (4, 3, 12, 2))
    p = divide(w, Division(2, ((4, True), (8, True)), ""))
    p = p.each(lambda a: quantize_array(a, int8, (0,)))
    w = dense(p)
    fn = lambda w: VIEWS[name](w)[..., :1]
    np.testing.assert_array_equal(Piecewise(fn)(p), fn(w))


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_those_of_the_array(view):
    w = jr.normal(jr.key(0), (4, 3, 12, 2))
    p = divide(w, Division(2, ((4, True), (8, True)), ""))
    got, want = VIEWS[view](p), VIEWS[view](w)
    assert isinstance(got, Pieces) and (got.shape, got.dtype) == (
        want.shape,
        want.dtype,
    )
    np.testing.assert_array_equal(got.dense(), want)


def test_views_across_pieces_are_declined():
    w = divide(jnp.zeros((4, 12)), Division(1, ((5, True), (7, True)), ""))
    assert w.reshape((4, 3, 4)) is NotImplemented
    assert w.reshape((48,)) is NotImplemented
    assert w.cut(0, 4) is NotImplemented and w.cut(5, 5) is NotImplemented


PROGRAMS = {
    "a part of one": lambda w, x: (x @ w)[:, 1:3],
    "several": lambda w, x: (x @ w)[:, 4:],
    "every second": lambda w, x: (x @ w)[:, ::2],
    "of another dim": lambda w, x: (x @ w)[1:, :4],
    "split elsewhere": lambda w, x: sum(jnp.split(x @ w, 2, 0)),
    "with an array": lambda w, x: jnp.split(x @ w + jnp.arange(12.0)[None], [4], -1)[0],
    "with itself": lambda w, x: jnp.split((x @ w) * (x @ w), [4], -1)[1],
    "summed over": lambda w, x: jnp.concatenate([x, x, x], 1)[:, :12] @ w.T,
    "two of them": lambda w, x: w @ w.T,
    "its rows": lambda w, x: w[jnp.array([2, 0])],
    "a condition": lambda w, x: jax.lax.cond(
        x[0, 0] > 0, lambda w: w[:, :4], lambda w: w[:, 8:], w
    ),
    "a function of its own": lambda w, x: jax.nn.relu(x @ w)[:, :4],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_program_computes_the_same(name):
    w, x = jr.normal(jr.key(0), (4, 12)), jr.normal(jr.key(1), (4, 4))
    p = divide(w, Division(1, ((4, True), (4, True), (4, False)), ""))
    fn = PROGRAMS[name]
    near(Piecewise(fn)(p, x), fn(w, x))
    near(lift(fn)(p, x), fn(w, x))
    total = lambda fn: lambda w, x: jnp.sin(fn(w, x)).sum()
    slope = jax.grad(total(Piecewise(fn)))(p, x)
    near(slope.dense(), jax.grad(total(fn))(w, x))
    optax.sgd(0.1).init(p)
