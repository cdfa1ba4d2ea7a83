"""Well-known architectures in Equinox and in plain JAX, as small as they can be."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

# Equinox: for one example; the zoo adds the batch -----------------------------------


class _Mlp(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, d, key):
        k1, k2 = jr.split(key)
        self.norm = eqx.nn.LayerNorm(d)
        self.up = eqx.nn.Linear(d, 24, key=k1)
        self.down = eqx.nn.Linear(24, d, key=k2)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(self.norm(x))))


class EqxViT(eqx.Module):
    """Equinox's layer norm computes its variance in two passes."""

    embed: eqx.nn.Conv2d
    token: jax.Array
    position: jax.Array
    norm: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    mlp: _Mlp
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3, k4 = jr.split(key, 4)
        self.embed = eqx.nn.Conv2d(3, 16, 4, stride=4, key=k1)
        self.token, self.position = jnp.zeros((1, 16)), jnp.zeros((5, 16))
        self.norm = eqx.nn.LayerNorm(16)
        self.attn = eqx.nn.MultiheadAttention(4, 16, key=k2)
        self.mlp = _Mlp(16, k3)
        self.head = eqx.nn.Linear(16, 5, key=k4)

    def __call__(self, x):
        x = self.embed(x)
        x = jnp.concatenate([self.token, x.reshape(16, -1).T]) + self.position
        y = jax.vmap(self.norm)(x)
        x = x + self.attn(y, y, y)
        x = x + jax.vmap(self.mlp)(x)
        return self.head(x[0])


class EqxResNet(eqx.Module):
    """Channels first, and no norm."""

    stem: eqx.nn.Conv2d
    convs: list[eqx.nn.Conv2d]
    short: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 7)
        conv = lambda a, b, n, s, key: eqx.nn.Conv2d(a, b, n, s, n // 2, key=key)
        self.stem = conv(3, 8, 3, 1, k[0])
        self.convs = [
            conv(8, 8, 3, 1, k[1]),
            conv(8, 8, 3, 1, k[2]),
            conv(8, 16, 3, 2, k[3]),
            conv(16, 16, 3, 1, k[4]),
        ]
        self.short = conv(8, 16, 1, 2, k[5])
        self.head = eqx.nn.Linear(16, 5, key=k[6])

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        y = self.convs[1](jax.nn.relu(self.convs[0](x)))
        x = jax.nn.relu(x + y)
        y = self.convs[3](jax.nn.relu(self.convs[2](x)))
        x = jax.nn.relu(self.short(x) + y)
        return self.head(x.mean((1, 2)))


class EqxGRU(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jr.split(key, 3)
        self.embed = eqx.nn.Embedding(17, 6, key=k1)
        self.cell = eqx.nn.GRUCell(6, 8, key=k2)
        self.head = eqx.nn.Linear(8, 5, key=k3)

    def __call__(self, tokens):
        step = lambda h, token: (self.cell(self.embed(token), h), None)
        h, _ = jax.lax.scan(step, jnp.zeros(8), tokens)
        return self.head(h)


class EqxLSTM(eqx.Module):
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jr.split(key)
        self.cell = eqx.nn.LSTMCell(6, 8, key=k1)
        self.head = eqx.nn.Linear(8, 5, key=k2)

    def __call__(self, xs):
        step = lambda state, x: (self.cell(x, state), None)
        (h, _), _ = jax.lax.scan(step, (jnp.zeros(8), jnp.zeros(8)), xs)
        return self.head(h)


# Plain JAX ---------------------------------------------------------------------------


def _two_pass(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"][None, None] + p["bias"][None, None]


def gpt2(params, tokens):
    """minGPT's: fused query, key and value, layer norm in two passes, tied head."""
    b, s = tokens.shape
    x = params["embed"][tokens] + params["position"][:s][None]
    for p in params["layers"]:
        y = _two_pass(x, p["norm1"]) @ p["qkv"]
        q, k, v = (
            t.reshape(b, s, 4, -1).swapaxes(1, 2) for t in jnp.split(y, 3, axis=-1)
        )
        scores = q @ k.swapaxes(-2, -1) / 2
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, s, s), bool)), scores, -jnp.inf)
        y = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(b, s, -1)
        x = x + y @ p["out"]
        y = _two_pass(x, p["norm2"])
        x = x + jax.nn.gelu(y @ p["up"]) @ p["down"]
    return _two_pass(x, params["norm"]) @ params["embed"].T


_NORM = {"scale": (16,), "bias": (16,)}
GPT2_SHAPES = {
    "embed": (17, 16),
    "position": (8, 16),
    "layers": [
        {
            "norm1": _NORM,
            "qkv": (16, 48),
            "out": (16, 16),
            "norm2": _NORM,
            "up": (16, 24),
            "down": (24, 16),
        }
        for _ in range(2)
    ],
    "norm": _NORM,
}


def resnext(params, x):
    """Channels first; a grouped convolution inside each residual block."""

    def conv(x, w, groups=1, stride=1):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=groups,
        )

    x = jax.nn.relu(conv(x, params["stem"]))
    for p in params["blocks"]:
        y = jax.nn.relu(conv(x, p["conv1"]))
        y = jax.nn.relu(conv(y, p["conv2"], groups=2))
        x = jax.nn.relu(x + conv(y, p["conv3"]))
    return x.mean((2, 3)) @ params["head"]


RESNEXT_SHAPES = {
    "stem": (8, 3, 3, 3),
    "blocks": [
        {"conv1": (12, 8, 1, 1), "conv2": (12, 6, 3, 3), "conv3": (8, 12, 1, 1)}
        for _ in range(2)
    ],
    "head": (8, 5),
}


def mixture(params, x):
    """A transformer's MLP as a mixture of four experts, each word to its best.

    Fedus et al. 2021, arXiv:2101.03961, without a capacity: all experts run.
    """
    gates = jax.nn.softmax(x @ params["router"], axis=-1)
    best = jnp.argmax(gates, axis=-1)
    chosen = jnp.zeros_like(gates)
    chosen = jnp.put_along_axis(chosen, best[..., None], 1.0, axis=-1, inplace=False)
    hidden = jax.nn.gelu(jnp.einsum("bsd,edh->bseh", x, params["up"]))
    y = jnp.einsum("bseh,ehd->bsed", hidden, params["down"])
    x = x + jnp.einsum("bsed,bse->bsd", y, gates * chosen)
    return x @ params["head"]


MIXTURE_SHAPES = {
    "router": (8, 4),
    "up": (4, 8, 12),
    "down": (4, 12, 8),
    "head": (8, 5),
}


def gru(params, xs):
    """A GRU whose reset gate acts before the recurrent product (Cho et al. 2014)."""
    n = params["state"].shape[0]

    def step(h, x):
        gates = jax.nn.sigmoid(x @ params["w_gates"] + h @ params["u_gates"])
        reset, update = jnp.split(gates, 2, axis=-1)
        new = jnp.tanh(x @ params["w"] + (reset * h) @ params["u"])
        return (1 - update) * h + update * new, None

    start = jnp.broadcast_to(params["state"], (xs.shape[0], n))
    h, _ = jax.lax.scan(step, start, xs.swapaxes(0, 1))
    return h @ params["head"]


GRU_SHAPES = {
    "w_gates": (6, 16),
    "u_gates": (8, 16),
    "w": (6, 8),
    "u": (8, 8),
    "state": (8,),
    "head": (8, 5),
}
