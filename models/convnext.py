"""ConvNeXt: a convolutional network with the proportions of a transformer.

Source: Liu et al. 2022, arXiv:2201.03545.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float


class _Block(nn.Module):
    """Depthwise 7x7, norm, an MLP over the channels, and a shortcut around all."""

    scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        y = nn.Conv(c, (7, 7), feature_group_count=c, name="depthwise")(x)
        y = nn.LayerNorm(epsilon=1e-6, name="norm")(y)
        y = jax.nn.gelu(nn.Dense(4 * c, name="up")(y), approximate=False)
        y = nn.Dense(c, name="down")(y)
        scale = self.param("scale", nn.initializers.constant(self.scale), (c,))
        return x + y * scale[None, None, None]


class ConvNeXt(nn.Module):
    """A ConvNeXt, without the stochastic depth of its training.

    Attributes:
        classes: number of logits.
        layout: (channels, blocks) of each stage; the default is ConvNeXt-T.
        patch: side of the patches that the stem reads, in pixels; 1 or 2 suits images
            of 32 pixels a side.
        scale: what each block's output is multiplied with at first.
    """

    classes: int = 10
    layout: tuple[tuple[int, int], ...] = ((96, 3), (192, 3), (384, 9), (768, 3))
    patch: int = 4
    scale: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits."""
        for stage, (channels, blocks) in enumerate(self.layout):
            if stage > 0:
                x = nn.LayerNorm(epsilon=1e-6, name=f"norm_{stage}")(x)
            side = (self.patch, self.patch) if stage == 0 else (2, 2)
            # SAME: an odd side is rounded up, where VALID might leave nothing.
            x = nn.Conv(channels, side, strides=side, name=f"down_{stage}")(x)
            if stage == 0:
                x = nn.LayerNorm(epsilon=1e-6, name="norm_0")(x)
            for i in range(blocks):
                x = _Block(self.scale, name=f"stage{stage + 1}_block{i}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x)
