"""Models by name, for scripts that take the name as an option."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import DTypeLike

from .bert import BERT
from .cnn import CNN
from .convnext import ConvNeXt
from .gpt import GPT
from .imagenet_resnet import ImageNetResNet
from .inverted import EfficientNet, MobileNetV2, MobileNetV3
from .llama import Llama, LlamaConfig
from .mlp import MLP
from .mobilenet import MobileNet
from .resnet import ResNet
from .vit import ViT

ImageModel = Literal[
    "mlp",
    "cnn",
    "mobilenet",
    "mobilenet_v2",
    "mobilenet_v3",
    "efficientnet",
    "convnext",
    "vit",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]
LanguageModel = Literal["gpt", "llama"]
IMAGE_MODELS: tuple[str, ...] = get_args(ImageModel)
LANGUAGE_MODELS: tuple[str, ...] = get_args(LanguageModel)
# They see what follows: to predict the next word would be to copy it.
MASKED_MODELS: tuple[str, ...] = ("bert",)


def _llama(
    vocab_size: int = 256,
    d_model: int = 128,
    hidden: int = 352,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    rope: Literal["adjacent", "half"] = "adjacent",
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-5,
    tied: bool = False,
    scan: bool = False,
    remat: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Llama:
    config = LlamaConfig(
        vocab_size,
        d_model,
        hidden,
        n_layers,
        n_heads,
        n_kv_heads,
        rope,
        rope_theta,
        norm_eps,
        tied,
    )
    return Llama(config, scan, remat, dtype, param_dtype)


def _imagenet(
    depth: int,
    groups: int = 1,
    group_width: int | None = None,
    classes: int = 10,
    width: int = 64,
) -> ImageNetResNet:
    return ImageNetResNet(depth, width, groups, group_width, classes)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "mobilenet": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3": MobileNetV3,
    "efficientnet": EfficientNet,
    "convnext": ConvNeXt,
    "vit": ViT,
    **{
        f"resnet{depth}": functools.partial(_imagenet, depth=depth, groups=1)
        for depth in (18, 34, 50, 101, 152)
    },
    "resnext50": functools.partial(_imagenet, depth=50, groups=32, group_width=4),
    **{
        f"resnet{depth}": functools.partial(ResNet, depth=depth)
        for depth in (20, 32, 44, 56, 110)
    },
    "gpt": GPT,
    "llama": _llama,
    "bert": BERT,
}


def _find(name: str) -> Callable[..., nn.Module]:
    if name not in _MODELS:
        raise ValueError(f"No model {name!r}. Choose one of {', '.join(_MODELS)}.")
    return _MODELS[name]


def options_of(name: str) -> tuple[str, ...]:
    """What `build(name, ...)` takes.

    Raises:
        ValueError: no such model.
    """
    make = _find(name)
    # What the name has fixed, and what Flax adds to every module, are no options.
    fixed = {"parent", "name", *getattr(make, "keywords", {})}
    return tuple(k for k in inspect.signature(make).parameters if k not in fixed)


def build(name: str, **options: Any) -> nn.Module:
    """The model `name` with its options: `build("mobilenet", classes=10, width=0.5)`.

    Image models take `classes`, language models and masked ones (`bert`)
    `vocab_size` (256: bytes).

    Raises:
        ValueError: no such model, or no such option of it; lists what there is.
    """
    make, known = _find(name), options_of(name)
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(
            f"The model {name!r} has no option {', '.join(unknown)}. It has "
            f"{', '.join(known)}."
        )
    return make(**options)
