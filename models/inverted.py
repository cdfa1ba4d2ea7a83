"""MobileNet V2 and V3, and EfficientNet: networks of inverted residuals.

Sources: Sandler et al. 2018, arXiv:1801.04381, table 2; Howard et al. 2019,
arXiv:1905.02244, tables 1 and 2; Tan & Le 2019, arXiv:1905.11946, table 1.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from .layers import ConvNorm, divisible, InvertedResidual

# (expansion, channels, blocks, stride of the first) of each stage.
_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# (kernel, channels in the middle, channels, squeeze, hard swish, stride) of each block.
_V3 = {
    "large": (
        (3, 16, 16, False, False, 1),
        (3, 64, 24, False, False, 2),
        (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2),
        (5, 120, 40, True, False, 1),
        (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
        (5, 960, 160, True, True, 1),
        (5, 960, 160, True, True, 1),
    ),
    "small": (
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    ),
}
# (expansion, kernel, stride of the first, channels, blocks) of each stage of B0.
_B0 = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class MobileNetV2(nn.Module):
    """MobileNet V2.

    Attributes:
        classes: number of logits.
        width: multiplies every channel count; results are multiples of 8.
        layout: (expansion, channels, blocks, stride of the first) of each stage.
        stem_stride: 2 halves the image at once; 1 suits images of 32 pixels a side.
    """

    classes: int = 10
    width: float = 1.0
    layout: Sequence[tuple[int, int, int, int]] = _V2
    stem_stride: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        relu6 = jax.nn.relu6
        channels = divisible(32 * self.width)
        x = ConvNorm(channels, 3, self.stem_stride, activation=relu6, name="stem")(
            x, train
        )
        number = 0
        for expansion, c, blocks, stride in self.layout:
            for i in range(blocks):
                x = InvertedResidual(
                    divisible(c * self.width),
                    x.shape[-1] * expansion,
                    stride=stride if i == 0 else 1,
                    name=f"block_{number}",
                )(x, train)
                number += 1
        last = divisible(1280 * max(1.0, self.width))
        x = ConvNorm(last, 1, activation=relu6, name="last")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class MobileNetV3(nn.Module):
    """MobileNet V3, large or small.

    Attributes:
        classes: number of logits.
        size: which of the paper's two networks.
        width: multiplies every channel count; results are multiples of 8.
        stem_stride: 2 halves the image at once; 1 suits images of 32 pixels a side.
    """

    classes: int = 10
    size: Literal["large", "small"] = "large"
    width: float = 1.0
    stem_stride: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        swish = jax.nn.hard_swish
        wide = lambda c: divisible(c * self.width)
        x = ConvNorm(wide(16), 3, self.stem_stride, activation=swish, name="stem")(
            x, train
        )
        expanded = 0
        for i, (kernel, middle, c, squeeze, hard, stride) in enumerate(_V3[self.size]):
            expanded = wide(middle)
            x = InvertedResidual(
                wide(c),
                expanded,
                kernel,
                stride,
                squeeze=divisible(expanded // 4) if squeeze else 0,
                activation=swish if hard else jax.nn.relu,
                gate=jax.nn.hard_sigmoid,
                name=f"block_{i}",
            )(x, train)
        x = ConvNorm(6 * x.shape[-1], 1, activation=swish, name="last")(x, train)
        hidden = wide({"large": 1280, "small": 1024}[self.size])
        x = swish(nn.Dense(hidden, name="hidden")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="head")(x)


class EfficientNet(nn.Module):
    """EfficientNet, without the dropout and the stochastic depth of its training.

    Attributes:
        classes: number of logits.
        width, depth: multiply channels and blocks; (1, 1) is B0, (1, 1.1) B1,
            (1.1, 1.2) B2, (1.2, 1.4) B3, (1.4, 1.8) B4.
        stem_stride: 2 halves the image at once; 1 suits images of 32 pixels a side.
    """

    classes: int = 10
    width: float = 1.0
    depth: float = 1.0
    stem_stride: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        wide = lambda c: divisible(c * self.width)
        x = ConvNorm(
            wide(32), 3, self.stem_stride, activation=jax.nn.silu, name="stem"
        )(x, train)
        number = 0
        for expansion, kernel, stride, c, blocks in _B0:
            for i in range(math.ceil(blocks * self.depth)):
                x = InvertedResidual(
                    wide(c),
                    x.shape[-1] * expansion,
                    kernel,
                    stride if i == 0 else 1,
                    squeeze=max(1, x.shape[-1] // 4),
                    activation=jax.nn.silu,
                    squeeze_activation=jax.nn.silu,
                    name=f"block_{number}",
                )(x, train)
                number += 1
        x = ConvNorm(4 * x.shape[-1], 1, activation=jax.nn.silu, name="last")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
