"""What an expert would write by hand, and what must be refused with its reason."""

import collections
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxeff import models, trace
from jaxeff.program import resize, zero_indices
from tests.program.built import build, zoo
from tests.program.shrinking import distance, random_keep, shrunk


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


X = shape(2, 4, 5)
# Weights around something: `a` makes the channels, `c` consumes them.
AROUND = {"a": shape(5, 8), "c": shape(8, 3), "s": shape(8)}


def around(middle):
    """dense, `middle(channels, params)`, dense."""
    return lambda p, x: middle(x @ p["a"], p) @ p["c"]


def hidden(middle):
    """The coupling of the channels between the two layers."""
    couplings = trace(around(middle), AROUND, X).couplings
    (found,) = (c for c in couplings if ("a", 1) in c.members and c.size > 1)
    return found


def two_pass(x, axes=-1):
    x = x - x.mean(axes, keepdims=True)
    return x / jnp.sqrt((x * x).mean(axes, keepdims=True) + 1e-5)


def one_pass(x):
    mean = x.mean(-1, keepdims=True)
    var = (x * x).mean(-1, keepdims=True) - mean * mean
    return (x - mean) * lax.rsqrt(jnp.maximum(var, 0.0) + 1e-5)


row = jnp.linspace(0, 1, 8)[None, None]


@jax.custom_vjp
def own(x):
    return jax.nn.softmax(x)


own.defvjp(lambda x: (own(x), None), lambda r, g: (g,))

SUM = "a sum over it sees entries that are not zero"
PRODUCT = "a product summed over it sees entries that are not zero"

FROZEN = {
    "variance in two passes": (lambda x, p: two_pass(x), SUM),
    "softmax over channels": (lambda x, p: jax.nn.softmax(x), "`reduce_max` over it"),
    "log-sum-exp": (
        lambda x, p: x * jax.nn.logsumexp(x, -1, keepdims=True),
        "`reduce_max` over it",
    ),
    "exp, then sum": (lambda x, p: x / jnp.exp(x).sum(-1, keepdims=True), SUM),
    "cos, then sum": (lambda x, p: x * jnp.cos(x).sum(-1, keepdims=True), SUM),
    "plus one, then sum": (lambda x, p: x * (x + 1).sum(-1, keepdims=True), SUM),
    "a constant, then sum": (
        lambda x, p: x * jnp.where(x > 0, x, 0.5).sum(-1, keepdims=True),
        SUM,
    ),
    "count": (lambda x, p: x * (x > 0).sum(-1, keepdims=True), SUM),
    "max": (lambda x, p: x.max(-1, keepdims=True) * x, "`reduce_max` over it"),
    "product": (lambda x, p: x.prod(-1, keepdims=True) * x, "`reduce_prod` over it"),
    "argmax": (
        lambda x, p: x + jnp.argmax(x, -1, keepdims=True),
        "`argmax` over it",
    ),
    "sort": (lambda x, p: jnp.sort(x, -1), "`sort` along it"),
    "cumulative sum": (lambda x, p: jnp.cumsum(x, -1), "`cumsum` along it"),
    "top k": (
        lambda x, p: x * lax.top_k(x, 1)[0],
        "the largest along it are chosen",
    ),
    "reversed": (lambda x, p: x[..., ::-1], "its order is reversed"),
    "strided slice": (
        lambda x, p: x * x[..., ::3].sum(-1, keepdims=True),
        r"a slice \[0:8:3\] of it",
    ),
    "unknown primitive": (
        lambda x, p: jnp.linalg.qr(x)[0] @ x,
        r"`\w+` has no rule",
    ),
    "Fourier transform": (
        lambda x, p: jnp.abs(jnp.fft.fft(x, axis=-1)),
        "a Fourier transform runs along it",
    ),
    "written at one place": (
        lambda x, p: x.at[..., 0].set(0.0),
        "positions along it are written",
    ),
    "written at places": (
        lambda x, p: x.at[..., jnp.array([0, 3])].add(1.0),
        "positions along it are written",
    ),
    "a part is written": (
        lambda x, p: x.at[..., 2:6].set(1.0),
        "a part of it is written",
    ),
    "channels to places of their own": (
        lambda x, p: (
            x
            * p["s"][None, None]
            * jax.ops.segment_sum(p["s"], jnp.round(p["s"]).astype(int), 3)[0]
        ),
        "each is written to a position of its own",
    ),
    "written, then sum": (
        lambda x, p: x * x.at[:, 0].set(0.5).sum(-1, keepdims=True),
        SUM,
    ),
    "a reduction of its own": (
        lambda x, p: x * lax.reduce(x, 0.0, lambda a, b: a + b * b, (2,))[..., None],
        "`reduce` over it",
    ),
    "random numbers of the hardware": (
        lambda x, p: (
            x
            * lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), x.shape)[1].astype(
                x.dtype
            )
        ),
        "random numbers depend on the shape",
    ),
    "gamma distribution": (
        lambda x, p: x * jr.gamma(jr.key(0), jnp.abs(x)),
        "random numbers depend on the shape",
    ),
    "order of channels": (
        lambda x, p: jnp.take_along_axis(x, jnp.argsort(x, 1), 1) * jnp.argsort(x, -1),
        "it counts positions",
    ),
    "positions": (
        lambda x, p: x * jnp.arange(8.0)[None, None],
        "it counts positions",
    ),
    "a constant array": (lambda x, p: x * row, "a constant array"),
    "a NumPy array": (
        lambda x, p: x * np.linspace(0, 1, 8, dtype=np.float32)[None, None],
        "a constant array",
    ),
    "random numbers": (
        lambda x, p: x * jr.normal(jr.key(0), x.shape),
        "random numbers depend on the shape",
    ),
    "looked up": (
        lambda x, p: jnp.repeat(x[..., jnp.array([0, 3])], 4, axis=-1),
        "positions along it are looked up",
    ),
    "chosen at run time": (
        lambda x, p: lax.dynamic_slice_in_dim(x, x.astype(int)[0, 0, 0], 1, 2) + x,
        "a part of it is chosen at run time",
    ),
    "overwritten at run time": (
        lambda x, p: lax.dynamic_update_slice_in_dim(x, x[..., :1], 3, 2),
        "a part of it is overwritten at run time",
    ),
    "a window along it": (
        lambda x, p: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 1, 2), (1, 1, 1), "SAME"
        ),
        "a sliding window along it",
    ),
    "product of activations": (
        lambda x, p: x * jnp.einsum("bsd,bsd->bs", jnp.cos(x), x + 1)[..., None],
        PRODUCT,
    ),
    "attention over channels that are not zero": (
        lambda x, p: x * jnp.einsum("bsd,btd->bs", x + 1, x + 1)[..., None],
        PRODUCT,
    ),
    "a kernel that is not zero": (
        lambda x, p: x * (jnp.cos(x) @ jnp.exp(p["c"][:, :1])),
        PRODUCT,
    ),
    "in a scan": (
        lambda x, p: lax.map(lambda x: x * jnp.cos(x).sum(), x.reshape(8, 8)).reshape(
            x.shape
        ),
        SUM,
    ),
    "a carry that becomes not zero": (
        lambda x, p: lax.scan(
            lambda h, x: (jnp.cos(h), x * h.sum(-1, keepdims=True)),
            jnp.tanh(x[:, 0]),
            x.swapaxes(0, 1),
        )[1].swapaxes(0, 1),
        SUM,
    ),
    "one branch of two": (
        lambda x, p: (
            x * lax.cond(x[0, 0, 0] > 0, jnp.tanh, jnp.cos, x).sum(-1, keepdims=True)
        ),
        SUM,
    ),
    "the test of a loop": (
        lambda x, p: lax.while_loop(lambda x: jnp.cos(x).sum() < 1, jnp.tanh, x),
        SUM,
    ),
    "in a custom_vjp": (lambda x, p: own(x), "`reduce_max` over it"),
    "in a remat": (
        lambda x, p: jax.checkpoint(lambda x: x * jnp.cos(x).mean(-1, keepdims=True))(
            x
        ),
        SUM,
    ),
    "in a shard_map": (
        lambda x, p: jax.shard_map(
            jnp.tanh,
            mesh=jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,)),
            in_specs=P("a"),
            out_specs=P("a"),
        )(x),
        "`shard_map` has no rule",
    ),
    "padding that is not zero": (
        lambda x, p: (
            x
            * jnp.pad(x, ((0, 0), (0, 0), (1, 1)), constant_values=1.0).sum(
                -1, keepdims=True
            )
        ),
        SUM,
    ),
    "cuts that do not fit": (
        lambda x, p: (
            x + x.reshape(2, 4, 2, 4).swapaxes(2, 3).reshape(x.shape)[..., ::-1]
        ),
        "its order is reversed",
    ),
    "looked up beyond the end": (
        lambda x, p: (
            x
            * jnp.take(
                p["a"], jnp.array([9]), axis=0, mode="fill", fill_value=1.0
            ).sum()
        ),
        SUM,
    ),
    "a maximum of constants": (
        lambda x, p: (
            x * (x + jnp.maximum(jnp.full_like(x, -1.0), -2.0)).sum(-1, keepdims=True)
        ),
        SUM,
    ),
    "bits": (
        lambda x, p: lax.bitcast_convert_type(x, jnp.uint8)[..., 0].astype(x.dtype),
        "`bitcast_convert_type` has no rule",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_would_not_be_exact_is_frozen_and_says_why(name):
    middle, reason = FROZEN[name]
    found = hidden(middle)
    assert found.frozen, found
    # The reason, and the line of this file that is to blame.
    assert re.match(reason, found.reason), found.reason
    if "constant array" not in reason:
        assert re.search(r" at test_couplings.py:\d+ \(", found.reason), found.reason


FREE = {
    "an activation": lambda x, p: jax.nn.gelu(x),
    "cos, then a layer": lambda x, p: jnp.cos(x),
    "a bias": lambda x, p: x + 1 + p["s"][None, None],
    "sum": lambda x, p: x * x.sum(-1, keepdims=True),
    "mean of squares": lambda x, p: x * (x * x).mean(-1, keepdims=True),
    "RMS norm": lambda x, p: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5),
    "layer norm in one pass": lambda x, p: one_pass(x) * p["s"][None, None],
    "norm over positions": lambda x, p: two_pass(x, 1),
    "softmax over positions": lambda x, p: jax.nn.softmax(x, 1),
    "cumulative sum over positions": lambda x, p: jnp.cumsum(jnp.cos(x), 1),
    "sort over positions": lambda x, p: jnp.sort(jnp.cos(x), 1),
    "top k over positions": lambda x, p: lax.top_k(x, 2, axis=1)[0],
    "pool over positions": lambda x, p: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"
    ),
    "squeeze and excite": lambda x, p: (
        x * jax.nn.sigmoid(x.mean(1) @ p["c"] @ p["c"].T)[:, None]
    ),
    "gate": lambda x, p: jax.nn.sigmoid(x) * jnp.tanh(x),
    "flags": lambda x, p: jnp.where(x > 0, x, 0.5 * x).sum(-1, keepdims=True) * x,
    "relu, then sum": lambda x, p: x * jax.nn.relu(x).sum(-1, keepdims=True),
    "clip, then sum": lambda x, p: x * jnp.clip(x, -1, 1).sum(-1, keepdims=True),
    "gram": lambda x, p: x @ jnp.einsum("bsd,bse->bde", x, x),
    "gram of what is not zero": lambda x, p: (
        x @ jnp.einsum("bsd,bse->bde", jnp.cos(x), jnp.cos(x))
    ),
    "dot with itself": lambda x, p: x * jnp.einsum("bsd,bsd->bs", x, x + 1)[..., None],
    "a product of weights": lambda x, p: jnp.cos(x) @ (p["c"] @ p["c"].T),
    "a view of a kernel": lambda x, p: jnp.cos(x) @ jnp.tanh(p["c"]) @ p["c"].T,
    "zeros to add to": lambda x, p: x + jnp.zeros(x.shape),
    "repeated": lambda x, p: x + jnp.repeat(x, 2, axis=1)[:, ::2],
    "a switch": lambda x, p: lax.switch(
        x.astype(int)[0, 0, 0], [jnp.tanh, jnp.cos, jax.nn.relu], x
    ),
    "half precision": lambda x, p: (
        x * jax.nn.relu(x.astype(jnp.bfloat16)).astype(x.dtype).sum(-1, keepdims=True)
    ),
    "named": lambda x, p: checkpoint_name(x, "x"),
    "Fourier transform over positions": lambda x, p: jnp.real(
        jnp.fft.fft(jnp.cos(x), axis=0)
    ),
    "Fourier transform, then sum": lambda x, p: (
        x * jnp.abs(jnp.fft.rfft(x, axis=0)).sum((0, 2))[None, :, None]
    ),
    "a row is written": lambda x, p: x.at[:, 0].set(0.5),
    "rows are added to": lambda x, p: x.at[:, jnp.array([0, 0, 2])].add(
        jnp.cos(x[:, :3])
    ),
    "zeros are written, then sum": lambda x, p: (
        x * x.at[:, jnp.array([0, 2])].set(0.0).sum(-1, keepdims=True)
    ),
    "scattered, then sum": lambda x, p: (
        x * jnp.zeros((x.shape[0], 3, 8)).at[:, jnp.array([0, 1, 2, 0])].add(x).sum()
    ),
    "scaled in places, then sum": lambda x, p: (
        x * x.at[:, 1].multiply(jnp.exp(x[:, 0])).sum(-1, keepdims=True)
    ),
    "each channel's own order of positions": lambda x, p: jnp.take_along_axis(
        x, jnp.argsort(jnp.cos(x), axis=1), axis=1
    ),
    "each channel's own position written, then sum": lambda x, p: (
        x
        * jax.vmap(lambda x, i: x.at[:, i].set(0.0), (2, 0), 2)(
            x, jnp.argmax(x[0], 0)
        ).sum(-1, keepdims=True)
    ),
    "cumulative sum, then sum": lambda x, p: (
        x * jnp.cumsum(x, 1).sum(-1, keepdims=True)
    ),
    "gradient of a pool over positions": lambda x, p: jax.grad(
        lambda x: (
            lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID") ** 2
        ).sum()
    )(x),
    "a window of its own over positions": lambda x, p: lax.reduce_window(
        x, 0.0, lambda a, b: a + 2 * b, (1, 2, 1), (1, 1, 1), "SAME"
    ),
    "a reduction of its own over positions": lambda x, p: (
        x + lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,))[:, None]
    ),
    "two arrays reduced at once": lambda x, p: (
        x
        + lax.reduce(
            (x, jnp.cos(x)),
            (0.0, 0.0),
            lambda a, b: (a[0] + b[0], a[1] + b[1] * a[0]),
            (1,),
        )[1][:, None]
    ),
    "resized over positions": lambda x, p: jax.image.resize(x, (2, 8, 8), "bilinear"),
    "nearest over positions": lambda x, p: jax.image.resize(x, (2, 8, 8), "nearest"),
    "side by side, then apart": lambda x, p: sum(
        jnp.unstack(jnp.stack([x, jnp.tanh(x)], axis=1) * 2, axis=1)
    ),
    "side by side, then sum": lambda x, p: (
        x * jnp.stack([x, jnp.tanh(x)], axis=-1).sum((-2, -1))[..., None]
    ),
    "repeated side by side": lambda x, p: (
        jnp.tile(x, (1, 1, 3)) @ jnp.tile(p["c"], (3, 1)) @ p["c"].T
    ),
    "repeated over positions, then sum": lambda x, p: (
        x * jnp.tile(x, (1, 2, 1)).sum((1, 2))[:, None, None]
    ),
    "special functions": lambda x, p: jax.scipy.special.gammainc(
        1 + x * x, jnp.abs(jax.scipy.special.i0e(x))
    ),
    "a product in channels": lambda x, p: x * jnp.prod(x, 1, keepdims=True).sum(),
    "identity": lambda x, p: lax.optimization_barrier(x),
}


@pytest.mark.parametrize("name", FREE)
def test_what_is_exact_is_free(name):
    middle = FREE[name]
    found = hidden(middle)
    assert not found.frozen, found.reason
    if name == "RMS norm":
        assert found.members == (("a", 1), ("c", 0))


@pytest.mark.parametrize("name", FREE)
def test_what_is_free_is_exact(name):
    fn, rng = around(FREE[name]), np.random.default_rng(0)
    params = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in AROUND.items()}
    x = rng.normal(size=(3, *X.shape[1:])).astype(np.float32)
    couplings = trace(fn, AROUND, X).couplings
    keep = random_keep(couplings, rng)
    small_fn, small = shrunk(fn, params, couplings, keep)
    want = jax.jit(fn)(zero_indices(params, couplings, keep), x)
    assert distance(jax.jit(small_fn)(small, x), want) < 1e-5
    assert small["a"].shape[1] < 8


# Layers, by who shares indices with whom.


def members(fn, params, *args):
    """For each coupling: its size, whether free, and the dims of weights in it."""
    return {
        frozenset(c.members): (c.size, not c.frozen)
        for c in trace(fn, params, *args).couplings
    }


def test_the_heads_of_attention_are_one_coupling_over_q_k_v_and_out():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
    params = jax.eval_shape(layer.init, jr.key(0), shape(2, 4, 6))
    found = members(layer.apply, params, shape(2, 4, 6))
    q, k, v, out = (f"params/{n}/kernel" for n in ("query", "key", "value", "out"))
    assert found == {
        frozenset({(out, 2)}): (6, False),  # the outputs
        frozenset({(q, 0), (k, 0), (v, 0)}): (6, False),  # the inputs
        frozenset({(q, 1), (k, 1), (v, 1), (out, 0)}): (2, True),
        frozenset({(q, 2), (k, 2)}): (3, True),
        frozenset({(v, 2), (out, 1)}): (3, True),
    }


def grouped(p, x):
    """Two query heads for each of three key and value heads."""
    q = (x @ p["q"]).reshape(*x.shape[:2], 3, 2, 4)
    k = (x @ p["k"]).reshape(*x.shape[:2], 3, 4)
    v = (x @ p["v"]).reshape(*x.shape[:2], 3, 4)
    a = jax.nn.softmax(jnp.einsum("bqhgk,bthk->bhgqt", q, k))
    return jnp.einsum("bhgqt,bthk->bqhgk", a, v).reshape(*x.shape[:2], -1) @ p["o"]


def repeated(p, x):
    """The same, with each key and value head repeated."""
    q = (x @ p["q"]).reshape(*x.shape[:2], 6, 4)
    k = jnp.repeat((x @ p["k"]).reshape(*x.shape[:2], 3, 4), 2, axis=2)
    v = jnp.repeat((x @ p["v"]).reshape(*x.shape[:2], 3, 4), 2, axis=2)
    a = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
    return jnp.einsum("bhqt,bthk->bqhk", a, v).reshape(*x.shape[:2], -1) @ p["o"]


@pytest.mark.parametrize("fn", [grouped, repeated])
def test_key_and_value_heads_go_with_their_group_of_query_heads(fn):
    params = {
        "q": shape(5, 24),
        "k": shape(5, 12),
        "v": shape(5, 12),
        "o": shape(24, 5),
    }
    found = members(fn, params, X)
    assert found == {
        frozenset({("q", 0), ("k", 0), ("v", 0)}): (5, False),
        frozenset({("q", 1), ("k", 1), ("v", 1), ("o", 0)}): (3, True),
        frozenset({("q", 1), ("o", 0)}): (2, True),  # query heads of each group
        frozenset({("q", 1), ("k", 1)}): (4, True),
        frozenset({("v", 1), ("o", 0)}): (4, True),
        frozenset({("o", 1)}): (5, False),
    }


@pytest.mark.parametrize("order", ["three first", "heads first"])
def test_a_fused_kernel_is_cut_in_three(order):
    def fn(p, x):
        qkv = x @ p["qkv"]
        if order == "three first":
            parts = jnp.split(qkv, 3, axis=-1)
            q, k, v = (y.reshape(*x.shape[:2], 2, 4) for y in parts)
        else:
            qkv = qkv.reshape(*x.shape[:2], 2, 3, 4)
            q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        a = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
        y = jnp.einsum("bhqt,bthk->bqhk", a, v)
        return y.reshape(*x.shape[:2], 8) @ p["out"]

    found = trace(fn, {"qkv": shape(5, 24), "out": shape(8, 5)}, X).couplings
    free = collections.Counter((c.size, c.members) for c in found.free)
    qkv, out = ("qkv", 1), ("out", 0)
    if order == "three first":
        assert free == {
            (2, (out, qkv)): 1,  # heads, at three places in the fused kernel
            (4, (qkv,)): 1,  # of queries and keys
            (4, (out, qkv)): 1,  # of values
        }
    else:  # one grid of (head, which, dim): the three share the dims of a head
        assert free == {(2, (out, qkv)): 1, (4, (out, qkv)): 1}


def test_rotary_embedding_freezes_the_width_of_queries_and_keys_alone():
    config = models.LlamaConfig(17, d_model=24, hidden=20, n_layers=1, n_heads=4)
    model = models.Llama(config)
    tokens = shape(2, 5, dtype=jnp.int32)
    params = jax.eval_shape(model.init, jr.key(0), tokens)
    found = trace(model.apply, params, tokens).couplings
    q, v = ((f"params/layer_0/attn/{n}/kernel", 1) for n in "qv")
    (pairs,) = (
        c for c in found if q in c.members and v not in c.members and c.size > 2
    )
    assert pairs.frozen and "it counts positions at llama.py" in pairs.reason
    free = [c for c in found.free if v in c.members]
    assert sorted(c.size for c in free) == [4, 6]  # heads, and the width of values


def test_group_norm_frees_whole_groups():
    def fn(p, x):
        y = (x @ p["a"]).reshape(*x.shape[:2], 2, 4)
        y = two_pass(y, (1, 3)).reshape(*x.shape[:2], 8)
        return (y * p["s"][None, None]) @ p["c"]

    found = members(fn, AROUND, X)
    together = frozenset({("a", 1), ("s", 0), ("c", 0)})
    couplings = trace(fn, AROUND, X).couplings
    both = [c for c in couplings if frozenset(c.members) == together]
    assert {(c.size, c.frozen) for c in both} == {(2, False), (4, True)}
    assert together in found


def test_a_shortcut_that_pads_channels_couples_the_middle():
    """Option A of CIFAR ResNets: zeros before and after the old channels."""

    def fn(p, x):
        x = jax.nn.relu(x @ p["a"])
        y = jnp.pad(x, ((0, 0), (0, 0), (2, 2)))
        return jax.nn.relu(y + jnp.tanh(x @ p["w"])) @ p["c"]

    params = {"a": shape(5, 4), "w": shape(4, 8), "c": shape(8, 3)}
    free = trace(fn, params, X).couplings.free
    assert {(c.size, c.members) for c in free} == {
        (4, (("a", 1), ("c", 0), ("w", 0), ("w", 1))),
        (2, (("c", 0), ("w", 1))),
    }
    assert len(free) == 3  # the zeros before, and those after


def test_the_width_of_a_tied_embedding_is_free_and_its_vocabulary_is_not():
    fn = lambda p, t: jax.nn.relu(p["e"][t]) @ p["e"].T
    couplings = trace(fn, {"e": shape(7, 6)}, shape(2, 3, dtype=jnp.int32)).couplings
    by_size = {c.size: c for c in couplings}
    assert not by_size[6].frozen and by_size[7].frozen


def test_the_hidden_state_of_an_lstm_is_one_coupling():
    from tests.zoo import ZOO

    (case,) = (c for c in ZOO if c.name == "plain_lstm")
    couplings = build(case).program.couplings
    (state,) = couplings.free
    assert set(state.members) == {
        ("input", 1),
        ("recurrent", 0),
        ("recurrent", 1),
        ("bias", 0),
        ("head", 0),
    }
    # Four gates of one width.
    keep = {state.name: np.arange(8) < 3}
    masks = couplings.masks("recurrent", keep)
    assert masks[0].sum() == 3 and masks[1].tolist() == [*masks[0].tolist() * 4]


def test_every_other_channel_is_one_half_of_each_pair():
    """Gate and value interleaved: their pairs leave together."""

    def fn(p, x):
        y = x @ p["both"] + p["bias"][None, None]
        return (jax.nn.silu(y[..., ::2]) * (y[..., 1::2] + 1)) @ p["down"]

    params = {"both": shape(5, 16), "bias": shape(16), "down": shape(8, 5)}
    assert members(fn, params, X) == {
        frozenset({("both", 0)}): (5, False),
        frozenset({("both", 1), ("bias", 0), ("down", 0)}): (8, True),
        frozenset({("both", 1), ("bias", 0)}): (2, False),
        frozenset({("down", 1)}): (5, False),
    }
    couplings = trace(fn, params, X).couplings
    (frozen,) = (c for c in couplings if c.size == 2)
    assert frozen.reason is not None
    assert frozen.reason.startswith("one in 2 of it is taken at test_couplings.py")
    rng = np.random.default_rng(0)
    weights = {
        n: rng.normal(size=s.shape).astype(np.float32) for n, s in params.items()
    }
    keep = random_keep(couplings, rng)
    small_fn, small = shrunk(fn, weights, couplings, keep)
    x = rng.normal(size=X.shape).astype(np.float32)
    want = fn(zero_indices(weights, couplings, keep), x)
    assert distance(small_fn(small, x), want) < 1e-5
    assert small["both"].shape[1] == 2 * small["down"].shape[0] < 16


def test_a_kernel_of_three_is_taken_apart():
    """Query, key and value along a dim of their own: their channels are free."""

    def fn(p, x):
        q, k, v = jnp.unstack(jnp.einsum("bsd,dci->bsci", x, p["qkv"]), axis=2)
        scores = jax.nn.softmax(q @ k.swapaxes(1, 2), axis=-1)
        return scores @ v @ p["out"]

    params = {"qkv": shape(5, 3, 8), "out": shape(8, 5)}
    assert members(fn, params, X) == {
        frozenset({("qkv", 0)}): (5, False),
        frozenset({("qkv", 1)}): (3, False),
        frozenset({("qkv", 2), ("out", 0)}): (8, True),
        frozenset({("out", 1)}): (5, False),
    }
    (frozen,) = (c for c in trace(fn, params, X).couplings if c.size == 3)
    assert frozen.reason is not None
    assert frozen.reason.startswith("it is taken apart, index by index at test_coup")


def test_depthwise_channels_and_their_multiples_are_two_couplings():
    def fn(p, x):
        y = lax.conv_general_dilated(
            x @ p["a"],
            p["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=8,
        )
        return y @ p["c"]

    params = {"a": shape(5, 8), "w": shape(3, 1, 16), "c": shape(16, 3)}
    free = trace(fn, params, X).couplings.free
    assert {(c.size, c.members) for c in free} == {
        (8, (("a", 1), ("c", 0), ("w", 2))),
        (2, (("c", 0), ("w", 2))),
    }


def test_groups_that_cut_across_a_concatenation_are_frozen_on_all_sides():
    def fn(p, x):
        y = jnp.concatenate([x @ p["a"], x @ p["b"]], -1)  # 6 + 10 in groups of 4
        return (
            lax.conv_general_dilated(
                y,
                p["w"],
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=4,
            )
            @ p["c"]
        )

    params = {
        "a": shape(5, 6),
        "b": shape(5, 10),
        "w": shape(1, 4, 8),
        "c": shape(8, 3),
    }
    assert not trace(fn, params, X).couplings.free


def test_a_split_across_a_product_is_refused():
    """Two rows of four channels are told apart, then cut after the third channel."""

    def fn(p, x):
        y = (x @ p["a"]).reshape(2, 4, 2, 4).swapaxes(2, 3).reshape(2, 4, 8)
        return jnp.concatenate(jnp.split(y, [3], -1), -1) @ p["c"]

    couplings = trace(fn, AROUND, X).couplings
    reasons = {c.reason for c in couplings if ("a", 1) in c.members}
    assert len(reasons) == 1
    assert reasons.pop().startswith("a split cuts across it at test_couplings.py:")


def test_layers_of_a_scan_share_their_dims():
    def scan(p, x):
        layer = lambda x, w: (x + jax.nn.relu(x @ w[0]) @ w[1], None)
        return lax.scan(layer, x @ p["in"], (p["up"], p["down"]))[0] @ p["out"]

    def loop(p, x):
        x = x @ p["in"]
        for i in range(3):
            x = x + jax.nn.relu(x @ p["up"][i]) @ p["down"][i]
        return x @ p["out"]

    params = {
        "in": shape(5, 6),
        "up": shape(3, 6, 8),
        "down": shape(3, 8, 6),
        "out": shape(6, 2),
    }
    for fn in (scan, loop):
        found = members(fn, params, X)
        assert found[frozenset({("up", 2), ("down", 1)})] == (8, True)
        stream = {("in", 1), ("up", 1), ("down", 2), ("out", 0)}
        assert found[frozenset(stream)] == (6, True)
    assert members(scan, params, X)[frozenset({("up", 0)})] == (3, False)


def test_inputs_and_outputs_are_frozen():
    fn = lambda p, x: (x @ p["a"], p["s"])
    reasons = {c.members[0]: c.reason for c in trace(fn, AROUND, X).couplings}
    assert reasons["a", 0] == "it is a dim of the inputs"
    assert reasons["a", 1] == "it is a dim of the outputs"
    assert reasons["s", 0] == "it is a dim of the outputs"


def test_a_weight_that_is_not_used_stays_whole():
    """Another function of the same weights may use it in any way."""
    fn = lambda p, x: (jnp.cos(x @ p["a"]), x)[1]
    reasons = {c.reason for c in trace(fn, {"a": AROUND["a"]}, X).couplings}
    (reason,) = reasons
    assert reason.startswith("this function does not use a: trace one that does")


def test_dims_of_one_index_couple_nothing():
    fn = lambda p, x: (x @ p["a"]) * p["one"] @ p["c"]
    params = {**AROUND, "one": shape(1, 1, 1)}
    couplings = trace(fn, params, X).couplings
    assert not any(path == "one" for c in couplings for path, _ in c.members)
    assert members(fn, params, X)[frozenset({("a", 1), ("c", 0)})] == (8, True)


# The 7B model, from shapes alone.


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def llama(request):
    model = models.Llama(models.LLAMA_7B, scan=request.param)
    tokens = shape(1, 2048, dtype=jnp.int32)
    params = jax.eval_shape(model.init, jr.key(0), tokens)
    return request.param, trace(model.apply, params, tokens)


def test_a_7b_model_has_exactly_the_couplings_an_expert_would_write(llama):
    scan, program = llama
    layers = ["params/layers"] if scan else [f"params/layer_{i}" for i in range(32)]
    shift = int(scan)  # a scan's weights have a leading dim of layers
    free = {frozenset(c.members): c.size for c in program.couplings.free}
    want = {}
    stream = {("params/embed/embedding", 1), ("params/norm/scale", 0)}
    stream |= {("params/head/kernel", 0)}
    for layer in layers:
        dims = lambda name, *ds, layer=layer: {
            (f"{layer}/{name}", d + shift) for d in ds
        }
        for name in ("attn_norm/scale", "mlp_norm/scale"):
            stream |= dims(name, 0)
        for name in ("attn/q", "attn/k", "attn/v", "mlp_gate", "mlp_up"):
            stream |= dims(name.replace("mlp_", "") + "/kernel", 0)
        for name in ("attn/o", "down"):
            stream |= dims(name + "/kernel", 1)
        hidden = dims("gate/kernel", 1) | dims("up/kernel", 1) | dims("down/kernel", 0)
        values = dims("attn/v/kernel", 1) | dims("attn/o/kernel", 0)
        heads = values | dims("attn/q/kernel", 1) | dims("attn/k/kernel", 1)
        want[frozenset(hidden)] = 11_008
        want[frozenset(heads)] = 32
        want[frozenset(values)] = 128  # the width of a head, of values
    want[frozenset(stream)] = 4096
    assert free == want
    assert len(program.couplings.free) == len(want)
    frozen = {c.size: c.reason for c in program.couplings if c.frozen}
    sizes = {64, 32_000} | ({32} if scan else set())  # pairs of dims that turn
    assert set(frozen) == sizes
    assert "it counts positions at llama.py" in frozen[64]
    if scan:
        assert "a scan runs over it" in frozen[32]


def test_a_7b_model_has_its_parameters_and_flops(llama):
    _, program = llama
    n = sum(aval.size for aval in program.shapes.values())
    assert n == 6_738_415_616
    looked_up = 32_000 * 4096
    # 2 FLOPs for each weight that multiplies and token, and attention.
    attention = 2 * 2 * 32 * 2048 * 2048 * 4096
    norms = 65 * 4096
    products = 2 * (n - looked_up - norms) * 2048 + attention
    assert program.costs.matmul_flops == products
    look_up = 2048 * 4096 + 3 * 2048  # rows that are not there are filled
    assert sum(c.flops for c in program.costs.weights.values()) == (
        products - attention + look_up
    )


# Views of couplings.


def test_masks_and_sums_of_a_weight_in_several_couplings():
    fn = lambda p, x: grouped(p, x)
    params = {
        "q": shape(5, 24),
        "k": shape(5, 12),
        "v": shape(5, 12),
        "o": shape(24, 5),
    }
    couplings = trace(fn, params, X).couplings
    heads, group, width = (
        next(c for c in couplings.free if c.size == n and ("q", 1) in c.members)
        for n in (3, 2, 4)
    )
    keep = {heads.name: np.array([1, 0, 1], bool), width.name: np.arange(4) < 3}
    rows, columns = couplings.masks("q", keep)
    grid = np.einsum("h,g,k->hgk", keep[heads.name], np.ones(2), keep[width.name])
    assert rows.all() and np.array_equal(columns, grid.reshape(-1).astype(bool))
    # Without a choice for it, a coupling keeps all.
    assert all(m.all() for m in couplings.masks("q", {}))

    values = {"q": np.random.default_rng(0).normal(size=(5, 24))}
    sums = couplings.sums(values, names=[heads.name, group.name])
    grid = values["q"].reshape(5, 3, 2, 4)
    np.testing.assert_allclose(sums[heads.name], grid.sum((0, 2, 3)))
    np.testing.assert_allclose(sums[group.name], grid.sum((0, 1, 3)))
    assert set(couplings.sums(values)) == {c.name for c in couplings}


def test_couplings_print_with_their_members_and_reasons():
    text = str(trace(around(lambda x, p: jax.nn.softmax(x)), AROUND, X).couplings)
    assert "frozen: `reduce_max` over it at test_couplings.py:" in text
    assert re.search(r"\n +a  dim 1\n +c  dim 0\n", text)


@zoo
def test_every_model_of_the_zoo_has_something_to_remove(case):
    couplings = build(case).program.couplings
    assert couplings.free
    assert len({c.name for c in couplings}) == len(couplings)
    for c in couplings:
        assert c.size > 1 and c.members
        assert c.frozen == (c.reason is not None)


def test_analysis_of_what_is_already_shrunk_is_of_the_small_sizes():
    fn = around(lambda x, p: jax.nn.relu(x))
    couplings = trace(fn, AROUND, X).couplings
    keep = {c.name: np.arange(c.size) < 3 for c in couplings.free if c.size == 8}
    small_fn, small = shrunk(fn, AROUND, couplings, keep)
    assert small_fn.fn is fn and isinstance(small_fn, type(resize(fn, small_fn.plan)))
    again = trace(small_fn, small, X).couplings
    assert 3 in {c.size for c in again.free}


def test_a_long_text_that_meets_its_next_token_is_analysed():
    """Position i with token i + 1, where both have the length of one weight."""

    def loss(params, tokens):
        x = params["words"][tokens] + params["positions"][None]
        logits = jnp.tanh(x) @ params["head"]
        picked = tokens[:, 1:, None] == jnp.arange(50)[None, None]
        return jnp.where(picked, logits[:, :-1], 0).sum()

    weights = {
        "words": shape(50, 16),
        "positions": shape(2048, 16),
        "head": shape(16, 50),
    }
    tokens = shape(2, 2048, dtype=jnp.int32)
    couplings = trace(loss, weights, tokens).couplings
    by_weight = {m: c for c in couplings for m in c.members}
    assert not by_weight["head", 0].frozen
    assert by_weight["positions", 0].frozen
