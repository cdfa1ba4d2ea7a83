"""MobileNet: a 3x3 convolution split into a depthwise and a 1x1 one.

The layout is a list of (channels, stride), so the same code serves 224x224
photographs and 8x8 digits.

Source: Howard et al. 2017, arXiv:1704.04861, table 1.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

# (channels, stride) of the first, full convolution and of each separable block.
LAYOUT_224 = (
    (32, 2),
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *(((512, 1),) * 5),
    (1024, 2),
    (1024, 1),
)
# For images of 8 to 32 pixels a side: two halvings in place of five.
LAYOUT_SMALL = ((32, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1))


class Separable(nn.Module):
    """Depthwise 3x3, then 1x1, each with batch norm and ReLU."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h2 w2 channels"]:
        """`h2`, `w2` are `h`, `w` divided by the stride, rounded up."""
        channels_in = x.shape[-1]
        x = nn.Conv(
            channels_in,
            (3, 3),
            strides=self.stride,
            feature_group_count=channels_in,
            use_bias=False,
            name="depthwise",
        )(x)
        x = _norm(train, "depthwise_norm")(x)
        x = jax.nn.relu(x)
        x = nn.Conv(self.channels, (1, 1), use_bias=False, name="pointwise")(x)
        x = _norm(train, "pointwise_norm")(x)
        return jax.nn.relu(x)


class MobileNet(nn.Module):
    """MobileNet V1.

    Attributes:
        classes: number of logits.
        width: multiplies every channel count (the paper's alpha); the result is
            rounded down, but stays at least 8.
        layout: (channels, stride) of the stem and of each separable block.
    """

    classes: int = 10
    width: float = 1.0
    layout: Sequence[tuple[int, int]] = LAYOUT_SMALL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        (channels, stride), *blocks = (
            (max(8, int(c * self.width)), s) for c, s in self.layout
        )
        x = nn.Conv(channels, (3, 3), strides=stride, use_bias=False, name="stem")(x)
        x = jax.nn.relu(_norm(train, "stem_norm")(x))
        for i, (channels, stride) in enumerate(blocks):
            x = Separable(channels, stride, name=f"block_{i}")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
