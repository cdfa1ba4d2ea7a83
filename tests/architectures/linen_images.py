"""Convolutional networks and image mixers in Linen that `models/` does not hold."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def _norm(x):
    return jax.nn.relu(nn.BatchNorm(use_running_average=True)(x))


class VGG(nn.Module):
    """Simonyan & Zisserman 2014, arXiv:1409.1556, with batch norm.

    The head flattens space and channels, as the paper's does.
    """

    layout: tuple[tuple[int, ...], ...] = ((8, 8), (12, 12), (16,))

    @nn.compact
    def __call__(self, x):
        for stage in self.layout:
            for channels in stage:
                x = _norm(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.relu(nn.Dense(24)(x))
        return nn.Dense(5)(x)


class DenseNet(nn.Module):
    """Huang et al. 2016, arXiv:1608.06993: every layer reads all before it."""

    growth: int = 4
    blocks: tuple[int, ...] = (3, 2)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for b, layers in enumerate(self.blocks):
            if b > 0:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(_norm(x))
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for _ in range(layers):
                y = nn.Conv(4 * self.growth, (1, 1), use_bias=False)(_norm(x))
                y = nn.Conv(self.growth, (3, 3), use_bias=False)(_norm(y))
                x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(5)(_norm(x).mean((1, 2)))


class C2f(nn.Module):
    """The block of YOLOv8: chunks, bottlenecks of the last one, all side by side.

    Around it a convolution and pools of growing reach (its SPPF).
    """

    channels: int = 8

    @nn.compact
    def __call__(self, x):
        conv = lambda n, k, x: jax.nn.silu(
            nn.BatchNorm(use_running_average=True)(
                nn.Conv(n, (k, k), use_bias=False)(x)
            )
        )
        x = conv(2 * self.channels, 3, x)
        parts = jnp.split(conv(2 * self.channels, 1, x), 2, axis=-1)
        for _ in range(2):
            y = conv(self.channels, 3, conv(self.channels, 3, parts[-1]))
            parts.append(parts[-1] + y)
        x = conv(12, 1, jnp.concatenate(parts, axis=-1))
        pools = [x]
        for _ in range(2):
            pools.append(nn.max_pool(pools[-1], (5, 5), padding="SAME"))
        return nn.Conv(5, (1, 1))(jnp.concatenate(pools, axis=-1))


def _shuffle(x):
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)


class ShuffleNetV2(nn.Module):
    """Ma et al. 2018, arXiv:1807.11164: half of the channels pass, then all shuffle."""

    stages: tuple[tuple[int, int], ...] = ((16, 2), (32, 2))

    @nn.compact
    def __call__(self, x):
        x = _norm(nn.Conv(8, (3, 3), use_bias=False)(x))
        for channels, units in self.stages:
            half = channels // 2
            left = self._depthwise(x, 2)
            left = _norm(nn.Conv(half, (1, 1), use_bias=False)(left))
            x = _shuffle(jnp.concatenate([left, self._branch(x, half, 2)], -1))
            for _ in range(units - 1):
                left, right = jnp.split(x, 2, axis=-1)
                right = self._branch(right, half, 1)
                x = _shuffle(jnp.concatenate([left, right], -1))
        x = _norm(nn.Conv(24, (1, 1), use_bias=False)(x))
        return nn.Dense(5)(x.mean((1, 2)))

    def _depthwise(self, x, stride):
        c = x.shape[-1]
        x = nn.Conv(c, (3, 3), strides=stride, feature_group_count=c, use_bias=False)(x)
        return nn.BatchNorm(use_running_average=True)(x)

    def _branch(self, x, channels, stride):
        x = _norm(nn.Conv(channels, (1, 1), use_bias=False)(x))
        x = self._depthwise(x, stride)
        return _norm(nn.Conv(channels, (1, 1), use_bias=False)(x))


class MLPMixer(nn.Module):
    """Tolstikhin et al. 2021, arXiv:2105.01601."""

    width: int = 16
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2))(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(12)(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class _WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each relative position."""

    heads: int
    window: int
    shift: int

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        n, d = self.window, c // self.heads
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
        y = x.reshape(b, h // n, n, w // n, n, c).swapaxes(2, 3)
        y = y.reshape(-1, n * n, c)
        qkv = nn.Dense(3 * c, name="qkv")(y)
        qkv = qkv.reshape(-1, n * n, 3, self.heads, d).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = q * d**-0.5 @ k.swapaxes(-2, -1)
        table = self.param(
            "relative", nn.initializers.normal(0.02), ((2 * n - 1) ** 2, self.heads)
        )
        at = jnp.stack(jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"), -1)
        at = at.reshape(-1, 2)
        apart = at[:, None] - at[None] + n - 1
        index = apart[..., 0] * (2 * n - 1) + apart[..., 1]
        scores = scores + table[index].transpose(2, 0, 1)[None]
        if self.shift:
            scores = self._hide_across(scores, h, w)
        y = jax.nn.softmax(scores, axis=-1) @ v
        y = nn.Dense(c, name="proj")(y.swapaxes(1, 2).reshape(-1, n * n, c))
        y = y.reshape(b, h // n, w // n, n, n, c).swapaxes(2, 3).reshape(b, h, w, c)
        return jnp.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y

    def _hide_across(self, scores, h, w):
        """After a roll a window holds what was not side by side."""
        n = self.window
        region = jnp.zeros((h, w), int)
        parts = slice(0, -n), slice(-n, -self.shift), slice(-self.shift, None)
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                region = region.at[rows, columns].set(3 * i + j)
        region = region.reshape(h // n, n, w // n, n).swapaxes(1, 2).reshape(-1, n * n)
        hidden = region[:, None, :] != region[:, :, None]
        windows = hidden.shape[0]
        scores = scores.reshape(-1, windows, *scores.shape[1:])
        scores = jnp.where(hidden[None, :, None], -100.0, scores)
        return scores.reshape(-1, *scores.shape[2:])


class Swin(nn.Module):
    """Liu et al. 2021, arXiv:2103.14030."""

    width: int = 16
    heads: tuple[int, ...] = (2, 4)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), name="embed")(x)
        x = nn.LayerNorm()(x)
        for stage, heads in enumerate(self.heads):
            if stage > 0:
                # Patch merging: the four pixels of a square, side by side.
                x = jnp.concatenate(
                    [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1
                )
                x = nn.LayerNorm(name=f"merge_norm_{stage}")(x)
                x = nn.Dense(x.shape[-1] // 2, use_bias=False, name=f"merge_{stage}")(x)
            window = min(4, x.shape[1])
            for i, shift in enumerate((0, window // 2 if window < x.shape[1] else 0)):
                y = nn.LayerNorm()(x)
                x = x + _WindowAttention(
                    heads, window, shift, name=f"attn_{stage}_{i}"
                )(y)
                y = nn.LayerNorm()(x)
                y = nn.gelu(nn.Dense(24, name=f"up_{stage}_{i}")(y))
                x = x + nn.Dense(x.shape[-1], name=f"down_{stage}_{i}")(y)
        return nn.Dense(5, name="head")(nn.LayerNorm()(x).mean((1, 2)))
