"""Small models of every kind a user may bring, for laws that hold for all of them.

Each case builds `(fn, params, args)` with `fn(params, *args)`: the models of
`models/`, and an MLP, a CNN and a transformer in NNX, Equinox and plain JAX. All
float32 and tiny. No parameter keeps a degenerate value: biases and means are not
zero, scales and variances not one, or a law could hold by accident.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import linen as nn, nnx

from jaxeff import models

Built = tuple[Callable, Any, tuple]


@dataclasses.dataclass(frozen=True)
class Case:
    """A named model; `build(key)` gives `(fn, params, args)`."""

    name: str
    build: Callable[[jax.Array], Built]


def draw(key: jax.Array, shapes: Any) -> Any:
    """Random values for a tree of arrays or `ShapeDtypeStruct`s, by leaf name."""
    # NumPy: eager JAX would compile a program for every shape.
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))

    def leaf(path, x):
        # NNX's paths end in the variable's own field.
        keys = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        name = [k for k in keys if k != "value"][-1]
        if name.endswith(("scale", "var")):
            value = rng.uniform(0.5, 1.5, x.shape)
        elif name.endswith(("bias", "mean")):
            value = rng.normal(0, 0.3, x.shape)
        else:
            fan_in = max(1, np.prod(x.shape[:-1]))
            value = rng.normal(0, max(0.2, fan_in**-0.5), x.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _image(key: jax.Array, *shape: int) -> jax.Array:
    return jr.normal(key, shape)


def _tokens(key: jax.Array, *shape: int) -> jax.Array:
    return jr.randint(key, shape, 0, 17)


# Linen ---------------------------------------------------------------------------


def _linen(name: str, make: Callable[[], nn.Module], make_args: Callable) -> Case:
    def build(key):
        k1, k2 = jr.split(key)
        model, args = make(), make_args(k1)
        return model.apply, draw(k2, jax.eval_shape(model.init, k2, *args)), args

    return Case(f"linen_{name}", build)


_LLAMA = models.LlamaConfig(
    vocab_size=17, d_model=16, hidden=24, n_layers=2, n_heads=4, n_kv_heads=2
)


class _LinenTransformer(nn.Module):
    """Flax's own attention, dense on several dims, dropout and layer norm."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for _ in range(2):
            y = nn.LayerNorm()(x)
            y = nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            x = x + nn.Dropout(0.1, deterministic=not train)(y)
            y = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
            x = x + nn.DenseGeneral(x.shape[-1])(y)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


_LINEN = [
    _linen(
        "mlp",
        lambda: models.MLP(features=(12, 8), classes=5),
        lambda k: (_image(k, 3, 3, 3, 1),),
    ),
    _linen(
        "cnn",
        lambda: models.CNN(stages=((8, 6), (10, 8)), classes=5),
        lambda k: (_image(k, 2, 8, 8, 1),),
    ),
    _linen(
        "mobilenet",
        lambda: models.MobileNet(classes=5, layout=((8, 1), (12, 1), (16, 2), (16, 1))),
        lambda k: (_image(k, 2, 8, 8, 3),),
    ),
    _linen(
        "resnet",
        lambda: models.ResNet(depth=8, width=4, classes=5),
        lambda k: (_image(k, 2, 8, 8, 3),),
    ),
    _linen(
        "gpt",
        lambda: models.GPT(vocab_size=17, max_len=8, d_model=16, n_layers=2, n_heads=2),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen(
        "gpt_untied",
        lambda: models.GPT(
            vocab_size=17, max_len=8, d_model=16, n_layers=1, n_heads=2, tied=False
        ),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen(
        "llama",
        lambda: models.Llama(_LLAMA),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen(
        "llama_half_tied_remat",
        lambda: models.Llama(
            dataclasses.replace(_LLAMA, rope="half", tied=True), remat=True
        ),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen(
        "llama_scan",
        lambda: models.Llama(_LLAMA, scan=True),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen(
        "llama_scan_remat",
        lambda: models.Llama(_LLAMA, scan=True, remat=True),
        lambda k: (_tokens(k, 2, 6),),
    ),
    _linen("transformer", _LinenTransformer, lambda k: (_image(k, 2, 5, 8),)),
]


# NNX -----------------------------------------------------------------------------


def _nnx(name: str, make: Callable[[nnx.Rngs], nnx.Module], make_args: Callable):
    def build(key):
        k1, k2 = jr.split(key)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def fn(state, *args):
            return nnx.merge(graphdef, state)(*args)

        return fn, draw(k2, state), make_args(k1)

    return Case(f"nnx_{name}", build)


class _NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(9, 12, rngs=rngs)
        self.outer = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


class _NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


class _NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, decode=False, keep_rngs=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class _NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 8, rngs=rngs)
        self.blocks = nnx.List([_NnxBlock(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 17, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


_NNX = [
    _nnx("mlp", _NnxMlp, lambda k: (_image(k, 3, 9),)),
    _nnx("cnn", _NnxCnn, lambda k: (_image(k, 2, 8, 8, 3),)),
    _nnx("transformer", _NnxTransformer, lambda k: (_tokens(k, 2, 5),)),
]


# Equinox -------------------------------------------------------------------------


def _equinox(name: str, make: Callable[[jax.Array], eqx.Module], make_args: Callable):
    def build(key):
        k1, k2 = jr.split(key)
        shapes = eqx.filter_eval_shape(make, k2)
        params, static = eqx.partition(
            shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct)
        )

        def fn(params, x):
            return jax.vmap(eqx.combine(params, static))(x)

        return fn, draw(k2, params), make_args(k1)

    return Case(f"equinox_{name}", build)


class _EqxCnn(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    pool: eqx.nn.MaxPool2d
    conv2: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jr.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(3, 8, 3, padding=1, key=k1)
        self.norm1 = eqx.nn.GroupNorm(groups=4, channels=8)
        self.pool = eqx.nn.MaxPool2d(2, stride=2)
        self.conv2 = eqx.nn.Conv2d(8, 6, 3, stride=2, padding=1, key=k2)
        self.head = eqx.nn.Linear(6, 5, key=k3)

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = jax.nn.relu(self.conv2(self.pool(x)))
        return self.head(x.mean((1, 2)))


class _EqxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    norm2: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jr.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(8)
        self.attn = eqx.nn.MultiheadAttention(2, 8, key=k1)
        self.norm2 = eqx.nn.RMSNorm(8)
        self.up = eqx.nn.Linear(8, 24, key=k2)
        self.down = eqx.nn.Linear(24, 8, key=k3)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attn(y, y, y)
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y))


class _EqxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[_EqxBlock]
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3, k4 = jr.split(key, 4)
        self.embed = eqx.nn.Embedding(17, 8, key=k1)
        self.blocks = [_EqxBlock(k2), _EqxBlock(k3)]
        self.head = eqx.nn.Linear(8, 17, key=k4)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


_EQUINOX = [
    _equinox(
        "mlp",
        lambda k: eqx.nn.MLP(9, 5, width_size=12, depth=2, key=k),
        lambda k: (_image(k, 3, 9),),
    ),
    _equinox("cnn", _EqxCnn, lambda k: (_image(k, 2, 3, 8, 8),)),
    _equinox("transformer", _EqxTransformer, lambda k: (_tokens(k, 2, 5),)),
]


# Plain JAX -----------------------------------------------------------------------


def _plain(name: str, fn: Callable, shapes: dict, make_args: Callable):
    """`shapes`: a tree of shapes; the key's name says how a leaf is drawn."""

    def build(key):
        k1, k2 = jr.split(key)
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return fn, draw(k2, params), make_args(k1)

    return Case(f"plain_{name}", build)


def _plain_mlp(params, x):
    for layer in params["hidden"]:
        x = jax.nn.relu(x @ layer["w"] + layer["bias"][None])
    return x @ params["head"]["w"] + params["head"]["bias"][None]


def _plain_conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _plain_cnn(params, x):
    x = _plain_conv(x, params["stem"])
    # Batch norm, folded by hand in the usual two lines.
    norm = params["norm"]
    factor = norm["scale"] * jax.lax.rsqrt(norm["var"] + 1e-5)
    x = (x - norm["mean"][None, None, None]) * factor[None, None, None]
    x = jax.nn.relu(x + norm["bias"][None, None, None])
    x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    # A depthwise convolution with two outputs for each channel.
    x = jax.nn.relu(_plain_conv(x, params["depthwise"], groups=x.shape[-1]))
    # Two parallel branches, concatenated.
    left = jnp.tanh(_plain_conv(x, params["left"], stride=2))
    right = jax.nn.relu(_plain_conv(x, params["right"], stride=2))
    x = jnp.concatenate([left, right], axis=-1)
    return x.mean((1, 2)) @ params["head"]


def _rms_norm(x, scale):
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * scale[None, None]


def _plain_transformer(params, tokens):
    """Stacked blocks in one rematerialised scan; fused query, key and value."""

    @jax.checkpoint
    def block(x, p):
        b, s, _ = x.shape
        y = _rms_norm(x, p["attn_scale"])
        qkv = jnp.einsum("bsd,dchk->cbshk", y, p["qkv"])
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = jnp.einsum("bqhk,bthk->bhqt", q, k) * 4**-0.5
        mask = jnp.tril(jnp.ones((s, s), bool))
        scores = jnp.where(mask[None, None], scores, -1e9)
        y = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores, axis=-1), v)
        x = x + jnp.einsum("bqhk,hkd->bqd", y, p["out"])
        y = _rms_norm(x, p["mlp_scale"])
        gate, up = jnp.split(y @ p["gate_up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ p["down"], None

    x = params["embed"][tokens]
    x, _ = jax.lax.scan(block, x, params["layers"])
    return x @ params["embed"].T


def _plain_control_flow(params, x):
    """A `while` that iterates a layer, then a `cond` between two layers."""

    def step(state):
        i, y = state
        return i + 1, jnp.tanh(y @ params["loop"] + x)

    _, y = jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))
    y = jax.lax.cond(
        y.sum() > 0,
        lambda y: jax.nn.relu(y @ params["yes"]),
        lambda y: jnp.tanh(y @ params["no"]),
        y,
    )
    return y @ params["head"]


@jax.custom_vjp
def _clipped_gradient(x):
    return jnp.tanh(x)


_clipped_gradient.defvjp(
    lambda x: (jnp.tanh(x), x),
    lambda x, g: (jnp.clip(g, -1, 1) * (1 - jnp.tanh(x) ** 2),),
)


def _plain_custom_vjp(params, x):
    y = _clipped_gradient(x @ params["inner"] + params["bias"][None])
    return y @ params["outer"]


def _plain_lstm(params, xs):
    """An LSTM over time: the same weights in each step of a scan."""
    hidden = params["recurrent"].shape[0]

    def step(state, x):
        h, c = state
        gates = x @ params["input"] + h @ params["recurrent"] + params["bias"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((xs.shape[0], hidden))
    _, hs = jax.lax.scan(step, (zero, zero), xs.swapaxes(0, 1))
    return hs.swapaxes(0, 1) @ params["head"]


_PLAIN = [
    _plain(
        "mlp",
        _plain_mlp,
        {
            "hidden": [{"w": (9, 12), "bias": (12,)}, {"w": (12, 8), "bias": (8,)}],
            "head": {"w": (8, 5), "bias": (5,)},
        },
        lambda k: (_image(k, 3, 9),),
    ),
    _plain(
        "cnn",
        _plain_cnn,
        {
            "stem": (3, 3, 3, 8),
            "norm": {n: (8,) for n in ("scale", "bias", "mean", "var")},
            "depthwise": (3, 3, 1, 16),
            "left": (1, 1, 16, 6),
            "right": (3, 3, 16, 4),
            "head": (10, 5),
        },
        lambda k: (_image(k, 2, 8, 8, 3),),
    ),
    _plain(
        "transformer",
        _plain_transformer,
        {
            "embed": (17, 8),
            "layers": {
                "attn_scale": (2, 8),
                "qkv": (2, 8, 3, 2, 4),
                "out": (2, 2, 4, 8),
                "mlp_scale": (2, 8),
                "gate_up": (2, 8, 24),
                "down": (2, 12, 8),
            },
        },
        lambda k: (_tokens(k, 2, 5),),
    ),
    _plain(
        "control_flow",
        _plain_control_flow,
        {"loop": (8, 8), "yes": (8, 12), "no": (8, 12), "head": (12, 5)},
        lambda k: (_image(k, 3, 8),),
    ),
    _plain(
        "custom_vjp",
        _plain_custom_vjp,
        {"inner": (9, 12), "bias": (12,), "outer": (12, 5)},
        lambda k: (_image(k, 3, 9),),
    ),
    _plain(
        "lstm",
        _plain_lstm,
        {"input": (6, 32), "recurrent": (8, 32), "bias": (32,), "head": (8, 5)},
        lambda k: (_image(k, 2, 4, 6),),
    ),
]

ZOO = [*_LINEN, *_NNX, *_EQUINOX, *_PLAIN]
