"""BERT: an encoder that reads in both directions and fills in masked words.

Source: Devlin et al. 2018, arXiv:1810.04805.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

_INIT = nn.initializers.normal(0.02)


class _Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    n_heads: int
    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b 1 1 s"] | None
    ) -> Float[Array, "b s d"]:
        y: Any = nn.MultiHeadDotProductAttention(
            self.n_heads, kernel_init=_INIT, name="attn"
        )(x, x, mask=mask)
        x = nn.LayerNorm(epsilon=1e-12, name="attn_norm")(x + y)
        y = nn.Dense(self.hidden, kernel_init=_INIT, name="up")(x)
        y = jax.nn.gelu(y, approximate=False)
        y = nn.Dense(x.shape[-1], kernel_init=_INIT, name="down")(y)
        return nn.LayerNorm(epsilon=1e-12, name="mlp_norm")(x + y)


class BERT(nn.Module):
    """BERT with its masked language model; the defaults of a small one.

    `BERT(30_522, 512, 768, 12, 12)` has the sizes of BERT base.

    Attributes:
        max_len: the longest sequence; positions are learned up to there.
        hidden: width of each MLP; None is 4 times `d_model`.
        types: kinds of segments (question, text ...).
    """

    vocab_size: int = 256
    max_len: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    hidden: int | None = None
    types: int = 2

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        types: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s vocab"]:
        """Logits of the word at each position.

        Args:
            tokens: the words, some of them replaced by a mask token.
            mask: True where there is a word, False on padding; None for no padding.
            types: the segment of each position; None is segment 0.
        """
        b, s = tokens.shape
        if s > self.max_len:
            raise ValueError(
                f"Positions are learned up to max_len={self.max_len}, got {s} tokens. "
                f"Shorten the sequence or build the model with a larger max_len."
            )
        table = lambda n, name: nn.Embed(
            n, self.d_model, embedding_init=_INIT, name=name
        )
        embed = table(self.vocab_size, "embed")
        types = jnp.zeros_like(tokens) if types is None else types
        x = embed(tokens) + table(self.types, "type")(types)
        x = x + table(self.max_len, "position")(jnp.arange(s))[None]
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        seen = None if mask is None else mask[:, None, None, :]
        for i in range(self.n_layers):
            x = _Block(
                self.n_heads, self.hidden or 4 * self.d_model, name=f"layer_{i}"
            )(x, seen)
        x = nn.Dense(self.d_model, kernel_init=_INIT, name="transform")(x)
        x = jax.nn.gelu(x, approximate=False)
        x = nn.LayerNorm(epsilon=1e-12, name="transform_norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        return embed.attend(x) + bias[None, None]
