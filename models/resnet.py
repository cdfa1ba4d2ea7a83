"""Residual networks for CIFAR, with the shortcut that has no parameters.

Depth is 6n + 2: a stem, three stages of n blocks of two convolutions, a head.
`params_from_torch` reads the tensors of a PyTorch network of the same design.

Source: He et al. 2015, arXiv:1512.03385, section 4.2 (shortcut "option A").
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

# One pixel on each side, as PyTorch's `padding=1`. With stride 2 that is not
# "SAME", which would put all of its padding at the bottom and right.
_PAD = ((1, 1), (1, 1))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h2 w2 channels"]:
        """`h2`, `w2` are `h`, `w` divided by the stride, rounded up."""
        y = _conv(self.channels, self.stride, "conv1")(x)
        y = jax.nn.relu(_norm(train, "norm1")(y))
        y = _conv(self.channels, 1, "conv2")(y)
        y = _norm(train, "norm2")(y)
        return jax.nn.relu(y + _shortcut(x, self.channels, self.stride))


class ResNet(nn.Module):
    """A CIFAR ResNet.

    Attributes:
        depth: 20, 32, 44, 56 ...: 6n + 2.
        width: channels of the first stage; the next two have 2 and 4 times as many.
        classes: number of logits.
    """

    depth: int = 20
    width: int = 16
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. `train` normalises by the batch and updates `batch_stats`."""
        blocks = _blocks_per_stage(self.depth)
        x = _conv(self.width, 1, "conv1")(x)
        x = jax.nn.relu(_norm(train, "norm1")(x))
        for stage in range(3):
            for i in range(blocks):
                x = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    name=f"stage{stage + 1}_block{i}",
                )(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def params_from_torch(
    tensors: Mapping[str, np.ndarray], *, depth: int = 20
) -> dict[str, Any]:
    """The variables of `ResNet(depth)` from a PyTorch state dict.

    Args:
        tensors: `conv1.weight` (16, 3, 3, 3), `bn1.{weight,bias,running_mean,
            running_var}`, `layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}.*`,
            `linear.{weight,bias}`. `num_batches_tracked` is ignored.

    Raises:
        ValueError: a tensor is missing, unknown, or of the wrong shape.
    """
    names = _torch_names(depth)
    given = {k for k in tensors if not k.endswith("num_batches_tracked")}
    missing, unknown = sorted(names.keys() - given), sorted(given - names.keys())
    if missing or unknown:
        raise ValueError(
            f"A ResNet-{depth} has {len(names)} tensors; here {len(missing)} are "
            f"missing (such as {missing[:3]}) and {len(unknown)} unknown (such as "
            f"{unknown[:3]}). Give the state dict of a CIFAR ResNet of that depth, "
            f"or its `depth`."
        )
    stem, head = tensors["conv1.weight"].shape, tensors["linear.weight"].shape
    if len(stem) != 4 or len(head) != 2:
        raise ValueError(
            f"conv1.weight has 4 dims (out, in, height, width) and linear.weight 2 "
            f"(out, in), got shapes {stem} and {head}. Give the tensors unchanged."
        )
    model = ResNet(depth, width=stem[0], classes=head[0])
    image = jax.ShapeDtypeStruct((1, 32, 32, stem[1]), jnp.float32)
    shapes: dict[tuple[str, ...], Any] = flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), image)
    )

    variables = {}
    for name, path in names.items():
        value = np.asarray(tensors[name])
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        elif value.ndim == 2:
            value = value.T  # (out, in) -> (in, out)
        want = shapes[path]
        if value.shape != want.shape:
            raise ValueError(
                f"{name} must give {'/'.join(path)} of shape {want.shape}, got "
                f"{value.shape}. Give the tensors of one network, unchanged."
            )
        variables[path] = jnp.asarray(value, want.dtype)
    return unflatten_dict(variables)


def _torch_names(depth: int) -> dict[str, tuple[str, ...]]:
    """PyTorch's name of each tensor -> its path in the Linen variables."""
    names: dict[str, tuple[str, ...]] = {
        "linear.weight": ("params", "head", "kernel"),
        "linear.bias": ("params", "head", "bias"),
    }
    # (prefix in PyTorch, modules in Linen, number) of each convolution and its norm.
    layers: list[tuple[str, tuple[str, ...], int]] = [("", (), 1)]
    for stage in (1, 2, 3):
        for block in range(_blocks_per_stage(depth)):
            for i in (1, 2):
                at = (f"stage{stage}_block{block}",)
                layers.append((f"layer{stage}.{block}.", at, i))
    for prefix, at, i in layers:
        norm = (*at, f"norm{i}")
        names[f"{prefix}conv{i}.weight"] = ("params", *at, f"conv{i}", "kernel")
        names[f"{prefix}bn{i}.weight"] = ("params", *norm, "scale")
        names[f"{prefix}bn{i}.bias"] = ("params", *norm, "bias")
        names[f"{prefix}bn{i}.running_mean"] = ("batch_stats", *norm, "mean")
        names[f"{prefix}bn{i}.running_var"] = ("batch_stats", *norm, "var")
    return names


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"The depth of a CIFAR ResNet is 6n + 2 with n >= 1, got {depth}. "
            f"Choose 8, 14, 20, 32, 44, 56 or 110."
        )
    return depth // 6


def _shortcut(
    x: Float[Array, "b h w c"], channels: int, stride: int
) -> Float[Array, "b h2 w2 channels"]:
    """Option A: every `stride`-th pixel, and zeros for the channels that are new."""
    b, h, w, channels_in = x.shape
    if stride != 1:
        x = jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))
    if channels != channels_in:
        before = (channels - channels_in) // 2
        after = channels - channels_in - before
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))
    return x


def _conv(channels: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        channels, (3, 3), strides=stride, padding=_PAD, use_bias=False, name=name
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name
    )
