"""A GPT-style decoder: pre-norm blocks, learned positions, GELU.

Query, key and value have a kernel each, rather than one fused kernel, so that
heads can be removed or sharded without knowing how three were packed in one.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners" (GPT-2).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, DTypeLike, Float, Int

_INIT = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Causal self-attention."""

    n_heads: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Each position attends to itself and to those before it."""
        b, s, d = x.shape
        head_dim = d // self.n_heads
        q, k, v = (
            nn.Dense(
                d,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=_INIT,
                name=name,
            )(x).reshape(b, s, self.n_heads, head_dim)
            for name in "qkv"
        )
        # float32: the softmax of long rows loses its tail in half precision.
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        row = jnp.arange(s)
        causal = row[None, None, :, None] >= row[None, None, None, :]
        scores = jnp.where(causal, scores * head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, d)
        return nn.Dense(
            d,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
            name="o",
        )(y)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    n_heads: int
    hidden: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """One pre-norm block."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.LayerNorm(name="attn_norm", **kinds)(x)
        x = x + Attention(self.n_heads, name="attn", **kinds)(y)
        y = nn.LayerNorm(name="mlp_norm", **kinds)(x)
        y = nn.Dense(self.hidden, kernel_init=_INIT, name="up", **kinds)(y)
        y = nn.Dense(x.shape[-1], kernel_init=_INIT, name="down", **kinds)(
            jax.nn.gelu(y)
        )
        return x + y


class GPT(nn.Module):
    """A GPT-2-style language model.

    Attributes:
        max_len: the longest sequence; positions are learned up to there.
        hidden: width of each MLP; None is 4 times `d_model`.
        tied: the output layer is the transpose of the embedding.
        dtype: of the computation; None follows the parameters.
    """

    vocab_size: int = 256
    max_len: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    hidden: int | None = None
    tied: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s vocab"]:
        """Logits of the token that follows each position."""
        s = tokens.shape[1]
        if s > self.max_len:
            raise ValueError(
                f"Positions are learned up to max_len={self.max_len}, got {s} tokens. "
                f"Shorten the sequence or build the model with a larger max_len."
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got {self.n_heads} heads for "
                f"{self.d_model}. Choose a divisor of {self.d_model}."
            )
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size,
            self.d_model,
            embedding_init=_INIT,
            name="embed",
            **kinds,
        )
        position = nn.Embed(
            self.max_len,
            self.d_model,
            embedding_init=_INIT,
            name="position",
            **kinds,
        )
        x = embed(tokens) + position(jnp.arange(s))[None]
        for i in range(self.n_layers):
            x = Block(
                self.n_heads,
                self.hidden or 4 * self.d_model,
                name=f"layer_{i}",
                **kinds,
            )(x)
        x = nn.LayerNorm(name="norm", **kinds)(x)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(
            self.vocab_size, use_bias=False, kernel_init=_INIT, name="head", **kinds
        )(x)
