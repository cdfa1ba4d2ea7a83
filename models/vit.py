"""A vision transformer: an image as a sequence of patches, read by a class token.

Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_INIT = nn.initializers.normal(0.02)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    n_heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        y = nn.LayerNorm(epsilon=1e-6, name="attn_norm")(x)
        y: Any = nn.MultiHeadDotProductAttention(self.n_heads, name="attn")(y, y)
        x = x + y
        y = nn.LayerNorm(epsilon=1e-6, name="mlp_norm")(x)
        y = jax.nn.gelu(nn.Dense(self.hidden, name="up")(y), approximate=False)
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    """A ViT; `ViT(1000, 16, 768, 12, 12)` is B/16.

    Attributes:
        classes: number of logits.
        patch: side of a patch, in pixels; it divides both sides of the image.
        hidden: width of each MLP; None is 4 times `d_model`.
    """

    classes: int = 10
    patch: int = 4
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 3
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits.

        Positions are learned for the size of the first image: others do not fit.
        """
        b, h, w, _ = x.shape
        if h % self.patch or w % self.patch:
            raise ValueError(
                f"Patches of {self.patch} pixels must cover the image, got {h} x {w}. "
                "Change `patch` or the size of the images."
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got {self.n_heads} heads for "
                f"{self.d_model}. Choose a divisor of {self.d_model}."
            )
        side = (self.patch, self.patch)
        x = nn.Conv(self.d_model, side, strides=side, padding="VALID", name="embed")(x)
        x = x.reshape(b, -1, self.d_model)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.d_model))
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, self.d_model)), x], axis=1)
        x = x + self.param("position", _INIT, (1, *x.shape[1:]))
        for i in range(self.n_layers):
            hidden = self.hidden or 4 * self.d_model
            x = _Block(self.n_heads, hidden, name=f"layer_{i}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])
