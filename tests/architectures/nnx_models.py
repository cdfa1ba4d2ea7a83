"""Well-known architectures in Flax NNX, as small as they can be."""

import jax
import jax.numpy as jnp
from flax import nnx


class _ConvNorm(nnx.Module):
    def __init__(self, a, b, kernel, rngs, stride=1, groups=1, act=nnx.relu):
        self.conv = nnx.Conv(
            a,
            b,
            (kernel, kernel),
            strides=stride,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(b, use_running_average=True, rngs=rngs)
        self.act = act

    def __call__(self, x):
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class _Bottleneck(nnx.Module):
    def __init__(self, a, b, rngs, stride=1, groups=1):
        self.conv1 = _ConvNorm(a, b, 1, rngs)
        self.conv2 = _ConvNorm(b, b, 3, rngs, stride, groups)
        self.conv3 = _ConvNorm(b, 2 * b, 1, rngs, act=None)
        changes = stride != 1 or a != 2 * b
        self.short = _ConvNorm(a, 2 * b, 1, rngs, stride, act=None) if changes else None

    def __call__(self, x):
        y = self.conv3(self.conv2(self.conv1(x)))
        return nnx.relu(y + (x if self.short is None else self.short(x)))


class ResNet(nnx.Module):
    """Bottlenecks; with groups, a ResNeXt."""

    def __init__(self, rngs, groups=1):
        self.stem = _ConvNorm(3, 8, 3, rngs)
        self.blocks = nnx.List(
            [
                _Bottleneck(8, 8, rngs, groups=groups),
                _Bottleneck(16, 8, rngs, groups=groups),
                _Bottleneck(16, 16, rngs, 2, groups),
            ]
        )
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class _Inverted(nnx.Module):
    def __init__(self, a, b, rngs, stride=1):
        self.expand = _ConvNorm(a, 3 * a, 1, rngs, act=nnx.relu6)
        self.depthwise = _ConvNorm(3 * a, 3 * a, 3, rngs, stride, 3 * a, nnx.relu6)
        self.project = _ConvNorm(3 * a, b, 1, rngs, act=None)
        self.residual = a == b and stride == 1

    def __call__(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    def __init__(self, rngs):
        self.stem = _ConvNorm(3, 8, 3, rngs)
        self.blocks = nnx.List(
            [_Inverted(8, 8, rngs), _Inverted(8, 12, rngs, 2), _Inverted(12, 12, rngs)]
        )
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class VGG(nnx.Module):
    def __init__(self, rngs):
        sizes = (3, 8, 8, 12, 12)
        self.convs = nnx.List(
            [_ConvNorm(a, b, 3, rngs) for a, b in zip(sizes, sizes[1:], strict=False)]
        )
        self.hidden = nnx.Linear(4 * 12, 16, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = nnx.max_pool(x, (2, 2), strides=(2, 2)) if i % 2 else x
        x = x.reshape(x.shape[0], -1)
        return self.head(nnx.relu(self.hidden(x)))


class DenseNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.layers = nnx.List([_ConvNorm(8 + 4 * i, 4, 3, rngs) for i in range(3)])
        self.head = nnx.Linear(20, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = jnp.concatenate([x, layer(x)], axis=-1)
        return self.head(x.mean((1, 2)))


class UNet(nnx.Module):
    """Up by interpolation, where the one of `models/` has transposed convolutions."""

    def __init__(self, rngs):
        self.down = _ConvNorm(3, 4, 3, rngs)
        self.middle = _ConvNorm(4, 8, 3, rngs)
        self.up = _ConvNorm(8, 4, 3, rngs)
        self.merge = _ConvNorm(8, 6, 3, rngs)
        self.head = nnx.Conv(6, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = self.down(x)
        x = self.middle(nnx.max_pool(skip, (2, 2), strides=(2, 2)))
        b, h, w, c = x.shape
        x = self.up(jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear"))
        return self.head(self.merge(jnp.concatenate([skip, x], axis=-1)))


class _Attention(nnx.Module):
    """Query, key and value by one kernel; grouped where there are fewer of those."""

    def __init__(self, d, heads, kv_heads, rngs, causal, rotary=False):
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.rotary, self.width = rotary, d // heads
        n = (heads + 2 * kv_heads) * self.width
        self.qkv = nnx.Linear(d, n, use_bias=not rotary, rngs=rngs)
        self.out = nnx.Linear(heads * self.width, d, use_bias=not rotary, rngs=rngs)

    def __call__(self, x):
        b, s, _ = x.shape
        k, n = self.kv_heads * self.width, self.heads * self.width
        q, key, v = jnp.split(self.qkv(x), [n, n + k], axis=-1)
        q = q.reshape(b, s, self.heads, self.width)
        key, v = (y.reshape(b, s, self.kv_heads, self.width) for y in (key, v))
        if self.rotary:
            q, key = _rotate(q), _rotate(key)
        each = self.heads // self.kv_heads
        key, v = jnp.repeat(key, each, axis=2), jnp.repeat(v, each, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, key) * self.width**-0.5
        if self.causal:
            seen = jnp.tril(jnp.ones((1, 1, s, s), bool))
            scores = jnp.where(seen, scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return self.out(y.reshape(b, s, -1))


def _rotate(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(half) / half)[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class _Block(nnx.Module):
    def __init__(self, d, rngs, causal=False, post=False):
        self.attn = _Attention(d, 4, 4, rngs, causal)
        self.norm1 = nnx.LayerNorm(d, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, rngs=rngs)
        self.up = nnx.Linear(d, 24, rngs=rngs)
        self.down = nnx.Linear(24, d, rngs=rngs)
        self.post = post

    def __call__(self, x):
        mlp = lambda x: self.down(nnx.gelu(self.up(x)))
        if self.post:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + mlp(self.norm2(x))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 16)))
        self.position = nnx.Param(jnp.zeros((1, 5, 16)))
        self.blocks = nnx.List([_Block(16, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        # The class token written into its place.
        whole = jnp.zeros((x.shape[0], x.shape[1] + 1, x.shape[2]))
        whole = whole.at[:, 1:].set(x).at[:, 0].set(self.token[...][:, 0])
        x = whole + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class BERT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 16, rngs=rngs)
        self.position = nnx.Embed(8, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.blocks = nnx.List([_Block(16, rngs, post=True) for _ in range(2)])
        self.pool = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, tokens):
        s = tokens.shape[1]
        x = self.norm(self.embed(tokens) + self.position(jnp.arange(s))[None])
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.tanh(self.pool(x[:, 0])))


class GPT2(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 16, rngs=rngs)
        self.position = nnx.Embed(8, 16, rngs=rngs)
        self.blocks = nnx.List([_Block(16, rngs, causal=True) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class _LlamaBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = _Attention(16, 4, 2, rngs, causal=True, rotary=True)
        self.norm1, self.norm2 = (nnx.RMSNorm(16, rngs=rngs) for _ in range(2))
        self.gate_up = nnx.Linear(16, 48, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(24, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        gate, up = jnp.split(self.gate_up(self.norm2(x)), 2, axis=-1)
        return x + self.down(nnx.silu(gate) * up)


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 16, rngs=rngs)
        self.blocks = nnx.List([_LlamaBlock(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 17, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nnx.Module):
    def __init__(self, cell, state, rngs):
        self.embed = nnx.Embed(17, 6, rngs=rngs)
        self.cell = cell(6, 8, keep_rngs=False, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)
        self.state = state

    def __call__(self, tokens):
        x = self.embed(tokens).swapaxes(0, 1)
        start = (jnp.zeros((x.shape[1], 8)),) * self.state
        start = start if self.state > 1 else start[0]
        return self.head(jax.lax.scan(lambda h, x: self.cell(h, x), start, x)[1][-1])
