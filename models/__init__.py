"""Functional Flax (Linen) models. They know nothing of compression."""

from .bert import BERT as BERT
from .cnn import CNN as CNN
from .convnext import ConvNeXt as ConvNeXt
from .decode import greedy as greedy, greedy_cached as greedy_cached
from .gpt import GPT as GPT
from .imagenet_resnet import ImageNetResNet as ImageNetResNet
from .inverted import (
    EfficientNet as EfficientNet,
    MobileNetV2 as MobileNetV2,
    MobileNetV3 as MobileNetV3,
)
from .llama import (
    Cache as Cache,
    init_cache as init_cache,
    Llama as Llama,
    LLAMA_1B as LLAMA_1B,
    LLAMA_7B as LLAMA_7B,
    LLAMA_70B as LLAMA_70B,
    LlamaConfig as LlamaConfig,
    rope_tables as rope_tables,
    rotate as rotate,
    stack_layers as stack_layers,
    STORIES260K as STORIES260K,
    unstack_layers as unstack_layers,
)
from .mlp import MLP as MLP
from .mobilenet import (
    LAYOUT_224 as LAYOUT_224,
    LAYOUT_SMALL as LAYOUT_SMALL,
    MobileNet as MobileNet,
)
from .pretrained import (
    load_resnet20 as load_resnet20,
    load_stories260k as load_stories260k,
)
from .registry import (
    build as build,
    IMAGE_MODELS as IMAGE_MODELS,
    ImageModel as ImageModel,
    LANGUAGE_MODELS as LANGUAGE_MODELS,
    LanguageModel as LanguageModel,
    MASKED_MODELS as MASKED_MODELS,
    options_of as options_of,
)
from .resnet import params_from_torch as params_from_torch, ResNet as ResNet
from .tokenizer import BOS as BOS, EOS as EOS, Tokenizer as Tokenizer
from .unet import UNet as UNet
from .vit import ViT as ViT
