"""A plain multi-layer perceptron.

Flattens whatever it is given, so the same model serves images and feature
vectors.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense layers with ReLU between them; the last one gives the logits.

    Attributes:
        features: width of each hidden layer.
        classes: number of logits.
    """

    features: Sequence[int] = (256, 256)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b classes"]:
        """Logits of a batch; every dim but the first is flattened."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = jax.nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)
