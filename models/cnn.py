"""A small convolutional net with batch norm, for images of 8x8 and up.

Plain 3x3 convolutions, no shortcuts: every inner channel can be removed on its
own, which makes it the simplest convolutional model to compress.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float


class CNN(nn.Module):
    """Stages of 3x3 convolutions; each stage but the last ends in a 2x2 max pool.

    Attributes:
        stages: for each stage, the channels of its convolutions.
        classes: number of logits.
    """

    stages: Sequence[Sequence[int]] = ((32, 32), (64, 64))
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for j, channels in enumerate(stage):
                # No bias: batch norm would subtract it again.
                x = nn.Conv(channels, (3, 3), use_bias=False, name=f"conv_{i}_{j}")(x)
                x = nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, name=f"norm_{i}_{j}"
                )(x)
                x = jax.nn.relu(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
