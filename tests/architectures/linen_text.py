"""Language models and recurrent networks in Linen that `models/` does not hold."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class _CausalAttention(nn.Module):
    """Query, key and value by one kernel, as GPT-2 has them."""

    heads: int

    @nn.compact
    def __call__(self, x):
        b, s, d = x.shape
        q, k, v = jnp.split(nn.Dense(3 * d, name="qkv")(x), 3, axis=-1)
        q, k, v = (y.reshape(b, s, self.heads, d // self.heads) for y in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(d / self.heads)
        mask = jnp.tril(jnp.ones((1, 1, s, s), bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return nn.Dense(d, name="proj")(y.reshape(b, s, d))


class GPT2(nn.Module):
    """Radford et al. 2019: fused query, key and value; the embedding is the head."""

    width: int = 16
    layers: int = 2
    fast_variance: bool = True

    @nn.compact
    def __call__(self, tokens):
        norm = lambda name: nn.LayerNorm(
            use_fast_variance=self.fast_variance, name=name
        )
        embed = nn.Embed(17, self.width, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (8, self.width))
        x = embed(tokens) + position[None, : tokens.shape[1]]
        for i in range(self.layers):
            x = x + _CausalAttention(4, name=f"attn_{i}")(norm(f"attn_norm_{i}")(x))
            y = nn.Dense(24, name=f"up_{i}")(norm(f"mlp_norm_{i}")(x))
            x = x + nn.Dense(self.width, name=f"down_{i}")(nn.gelu(y))
        return embed.attend(norm("norm")(x))


def _buckets(queries, keys, n=8, causal=False):
    """The bucket of each distance: exact for near ones, logarithmic for far ones."""
    apart = jnp.arange(keys)[None] - jnp.arange(queries)[:, None]
    start = 0
    if causal:
        apart = -jnp.minimum(apart, 0)
    else:
        n //= 2
        start = (apart > 0) * n
        apart = jnp.abs(apart)
    exact = n // 2
    far = jnp.log(jnp.maximum(apart, 1) / exact) / jnp.log(16 / exact) * (n - exact)
    far = jnp.minimum(exact + far.astype(int), n - 1)
    return start + jnp.where(apart < exact, apart, far)


class _T5Attention(nn.Module):
    """Without scale and biases; with a learned bias for each bucket of distances."""

    heads: int = 4
    width: int = 4

    @nn.compact
    def __call__(self, x, source=None, bias=None):
        source = x if source is None else source
        dense = lambda name: nn.DenseGeneral(
            (self.heads, self.width), use_bias=False, name=name
        )
        q, k, v = dense("q")(x), dense("k")(source), dense("v")(source)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="o")(y)


class _T5Stack(nn.Module):
    causal: bool
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x, source=None):
        s = x.shape[1]
        table = nn.Embed(8, self.heads, name="relative")
        bias = table(_buckets(s, s, causal=self.causal)).transpose(2, 0, 1)[None]
        if self.causal:
            bias = (
                bias + jnp.where(jnp.tril(jnp.ones((s, s), bool)), 0, -1e9)[None, None]
            )
        norm = lambda x: nn.RMSNorm()(x)
        for i in range(self.layers):
            x = x + _T5Attention(name=f"attn_{i}")(norm(x), bias=bias)
            if source is not None:
                x = x + _T5Attention(name=f"cross_{i}")(norm(x), source)
            y = norm(x)
            gate = nn.gelu(nn.Dense(24, use_bias=False, name=f"gate_{i}")(y))
            y = gate * nn.Dense(24, use_bias=False, name=f"up_{i}")(y)
            x = x + nn.Dense(x.shape[-1], use_bias=False, name=f"down_{i}")(y)
        return norm(x)


class T5(nn.Module):
    """Raffel et al. 2019, arXiv:1910.10683 (version 1.1): an encoder and a decoder."""

    width: int = 16

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(17, self.width, name="embed")
        read = _T5Stack(causal=False, name="encoder")(embed(source))
        # The decoder sees what came before: its input is shifted by one.
        before = jnp.zeros_like(target).at[:, 1:].set(target[:, :-1])
        x = _T5Stack(causal=True, name="decoder")(embed(before), read)
        return nn.Dense(17, use_bias=False, name="head")(x)


class Recurrent(nn.Module):
    """Two recurrent layers over words; the last state decides."""

    cell: type[nn.RNNCellBase]
    hidden: tuple[int, ...] = (12, 8)

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, 6)(tokens)
        for n in self.hidden:
            x = nn.RNN(self.cell(n))(x)
        return nn.Dense(5)(x[:, -1])


class BidirectionalGRU(nn.Module):
    """Forward and backward states side by side."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, 6)(tokens)
        both = nn.Bidirectional(nn.RNN(nn.GRUCell(8)), nn.RNN(nn.GRUCell(6)))
        return nn.Dense(5)(both(x))
