"""What several convolutional networks are built from."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jaxtyping import Array, Float

Activation = Callable[[Array], Array]


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, an activation.

    Attributes:
        kernel, stride: pixels a side. The padding is (kernel - 1) / 2 on each side,
            as PyTorch's; with stride 2 that is not "SAME", which would put all of
            its padding at the bottom and right.
        groups: the input channels are cut in so many, and each sees its own only.
        activation: None for none.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    activation: Activation | None = jax.nn.relu

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h2 w2 channels"]:
        """`h2`, `w2` are `h`, `w` divided by the stride, rounded up."""
        pad = (self.kernel - 1) // 2
        x = nn.Conv(
            self.channels,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=((pad, pad), (pad, pad)),
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm"
        )(x)
        return x if self.activation is None else self.activation(x)


class SqueezeExcite(nn.Module):
    """Weighs the channels by what all pixels say of them.

    Source: Hu et al. 2017, arXiv:1709.01507.
    """

    hidden: int
    activation: Activation = jax.nn.relu
    gate: Activation = jax.nn.sigmoid

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Each channel times a number of its own."""
        y = x.mean((1, 2), keepdims=True)
        y = self.activation(nn.Dense(self.hidden, name="reduce")(y))
        return x * self.gate(nn.Dense(x.shape[-1], name="expand")(y))


class InvertedResidual(nn.Module):
    """Widen, mix pixels channel by channel, narrow; and a shortcut where shapes agree.

    The block of MobileNet V2 and V3 and of EfficientNet.

    Attributes:
        expanded: channels in the middle; where they are those of the input, there is
            no layer to widen.
        squeeze: hidden width of the squeeze-and-excitation; 0 for none.
        gate: of the squeeze-and-excitation.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 1.
    """

    channels: int
    expanded: int
    kernel: int = 3
    stride: int = 1
    squeeze: int = 0
    activation: Activation = jax.nn.relu6
    squeeze_activation: Activation = jax.nn.relu
    gate: Activation = jax.nn.sigmoid

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h2 w2 channels"]:
        """`h2`, `w2` are `h`, `w` divided by the stride, rounded up."""
        y, n = x, self.expanded
        if n != x.shape[-1]:
            y = ConvNorm(n, 1, activation=self.activation, name="expand")(y, train)
        y = ConvNorm(n, self.kernel, self.stride, n, self.activation, name="depthwise")(
            y, train
        )
        if self.squeeze:
            y = SqueezeExcite(
                self.squeeze, self.squeeze_activation, self.gate, name="squeeze"
            )(y)
        y = ConvNorm(self.channels, 1, activation=None, name="project")(y, train)
        return x + y if x.shape == y.shape else y


def divisible(channels: float | int, by: int = 8) -> int:
    """The nearest multiple of `by`, at least `by` and at least 90 % of `channels`.

    Source: the reference code of MobileNet (`_make_divisible`).
    """
    n = max(by, int(channels + by / 2) // by * by)
    return n if n >= 0.9 * channels else n + by
