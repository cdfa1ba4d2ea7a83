"""Models by name, for scripts that take the name as an option."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import DTypeLike

from .cnn import CNN
from .gpt import GPT
from .llama import Llama, LlamaConfig
from .mlp import MLP
from .mobilenet import MobileNet
from .resnet import ResNet

ImageModel = Literal[
    "mlp",
    "cnn",
    "mobilenet",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]
LanguageModel = Literal["gpt", "llama"]
IMAGE_MODELS: tuple[str, ...] = get_args(ImageModel)
LANGUAGE_MODELS: tuple[str, ...] = get_args(LanguageModel)


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


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "mobilenet": MobileNet,
    "gpt": GPT,
    "llama": _llama,
}


def _find(name: str) -> Callable[..., nn.Module]:
    if name not in IMAGE_MODELS + LANGUAGE_MODELS:
        known = ", ".join(IMAGE_MODELS + LANGUAGE_MODELS)
        raise ValueError(f"No model {name!r}. Choose one of {known}.")
    family, _, depth = name.partition("resnet")
    return _MODELS[family] if family else functools.partial(ResNet, depth=int(depth))


def build(name: str, **options: Any) -> nn.Module:
    """The model `name` with its options: `build("mobilenet", classes=10, width=0.5)`.

    Image models take `classes`, language models `vocab_size` (256: bytes).

    Raises:
        ValueError: no such model, or no such option of it; lists what there is.
    """
    make = _find(name)
    # What the name has fixed, and what Flax adds to every module, are no options.
    fixed = {"parent", "name", *getattr(make, "keywords", {})}
    known = [key for key in inspect.signature(make).parameters if key not in fixed]
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(
            f"The model {name!r} has no option {', '.join(unknown)}. It has "
            f"{', '.join(known)}."
        )
    return make(**options)
