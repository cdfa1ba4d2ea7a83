"""A U-Net: down to few pixels and up again, with shortcuts at each size.

Padding keeps the size of the image, and batch norm follows each convolution, where
the paper has neither.

Source: Ronneberger et al. 2015, arXiv:1505.04597.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .layers import ConvNorm


class UNet(nn.Module):
    """Logits for each pixel of an image.

    Attributes:
        classes: logits per pixel.
        width: channels at full size; each halving of the image doubles them.
        levels: how often the image is halved.
    """

    classes: int = 2
    width: int = 64
    levels: int = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h w classes"]:
        """`h` and `w` are multiples of 2 ** levels.

        `train` normalises by the batch and updates `batch_stats`.
        """
        if x.shape[1] % 2**self.levels or x.shape[2] % 2**self.levels:
            raise ValueError(
                f"The image is halved {self.levels} times, so its sides must be "
                f"multiples of {2**self.levels}, got {x.shape[1]} x {x.shape[2]}. Pad "
                "it, or use fewer levels."
            )

        def twice(x, channels, name):
            x = ConvNorm(channels, name=f"{name}_conv1")(x, train)
            return ConvNorm(channels, name=f"{name}_conv2")(x, train)

        skips = []
        for i in range(self.levels):
            x = twice(x, self.width * 2**i, f"down_{i}")
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = twice(x, self.width * 2**self.levels, "middle")
        for i in reversed(range(self.levels)):
            channels = self.width * 2**i
            x = nn.ConvTranspose(channels, (2, 2), strides=(2, 2), name=f"up_{i}")(x)
            x = twice(jnp.concatenate([skips[i], x], -1), channels, f"merge_{i}")
        return nn.Conv(self.classes, (1, 1), name="head")(x)
