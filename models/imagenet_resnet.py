"""Residual networks for photographs: ResNet and ResNeXt.

With blocks of two 3x3 convolutions (18 and 34 layers) or bottlenecks (50, 101, 152),
and a 1x1 convolution on each shortcut that changes shape. The stride of a bottleneck
is in its 3x3 convolution, as in PyTorch, and not in the first 1x1 one.

Source: He et al. 2015, arXiv:1512.03385, table 1; Xie et al. 2016, arXiv:1611.05431.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from .layers import ConvNorm

# Blocks in each stage.
_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class _Block(nn.Module):
    """A residual block; `inner` is the width of a bottleneck, None for none."""

    channels: int
    stride: int = 1
    inner: int | None = None
    groups: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h2 w2 channels"]:
        if self.inner is None:
            y = ConvNorm(self.channels, 3, self.stride, name="conv1")(x, train)
            y = ConvNorm(self.channels, 3, activation=None, name="conv2")(y, train)
        else:
            y = ConvNorm(self.inner, 1, name="conv1")(x, train)
            y = ConvNorm(self.inner, 3, self.stride, self.groups, name="conv2")(
                y, train
            )
            y = ConvNorm(self.channels, 1, activation=None, name="conv3")(y, train)
        if x.shape != y.shape:
            x = ConvNorm(self.channels, 1, self.stride, activation=None, name="short")(
                x, train
            )
        return jax.nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """A ResNet of 18, 34, 50, 101 or 152 layers, or a ResNeXt.

    Attributes:
        depth: layers.
        width: channels of the first stage (a quarter of its output in a bottleneck);
            each further stage has twice as many.
        groups: of the 3x3 convolutions of bottlenecks; ResNeXt-50 32x4d is
            `depth=50, groups=32, group_width=4`.
        group_width: channels of each group in the first stage; None is
            `width / groups`.
        classes: number of logits.
        layout: blocks in each stage, in place of those of that depth.
    """

    depth: int = 50
    width: int = 64
    groups: int = 1
    group_width: int | None = None
    classes: int = 1000
    layout: tuple[int, ...] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        layouts = {**_BASIC, **_BOTTLENECK}
        if self.depth not in layouts:
            raise ValueError(
                f"A ResNet for ImageNet has {', '.join(map(str, layouts))} layers, got "
                f"depth={self.depth}. For 32x32 images, 20, 32, 44 ... are `ResNet`."
            )
        inner = None
        if self.depth in _BOTTLENECK:
            inner = self.groups * (self.group_width or self.width // self.groups)
        elif self.groups != 1:
            raise ValueError(
                f"Groups belong to bottlenecks, got {self.groups} at depth="
                f"{self.depth}. Choose a depth of {', '.join(map(str, _BOTTLENECK))}."
            )
        x = ConvNorm(self.width, 7, 2, name="stem")(x, train)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.layout or layouts[self.depth]):
            for i in range(blocks):
                x = _Block(
                    self.width * 2**stage * (1 if inner is None else 4),
                    stride=2 if stage > 0 and i == 0 else 1,
                    inner=None if inner is None else inner * 2**stage,
                    groups=self.groups,
                    name=f"stage{stage + 1}_block{i}",
                )(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
