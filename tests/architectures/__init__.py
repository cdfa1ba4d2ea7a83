"""Well-known architectures: what of each must be free to shrink, and what not."""

import dataclasses
from collections.abc import Callable

import jax
import jax.random as jr
from flax import linen as nn, nnx

from jaxeff import functional, models
from tests.architectures import linen_images, linen_text, nnx_models, others
from tests.zoo import _equinox, _linen, _plain, Case, draw

Place = tuple[str, int, int]  # the path of a weight, a dim of it, a coupling's size


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small model, and what an expert says of it.

    Attributes:
        free: couplings that must be free, each by one place where it is.
        frozen: those that must not be, with the beginning of the reason.
        slow: compiling it takes long.
    """

    case: Case
    free: tuple[Place, ...] = ()
    frozen: tuple[tuple[str, int, int, str], ...] = ()
    slow: bool = False


def image(side: int, channels: int = 3) -> Callable:
    return lambda key: (jr.normal(key, (2, side, side, channels)),)


def channels_first(key: jax.Array) -> tuple:
    return (jr.normal(key, (2, 3, 8, 8)),)


def words(*lengths: int) -> Callable:
    def make(key):
        keys = jr.split(key, len(lengths))
        return tuple(
            jr.randint(k, (2, n), 0, 17) for k, n in zip(keys, lengths, strict=True)
        )

    return make


def _nnx(name, make, args):
    def build(key):
        k1, k2 = jr.split(key)
        fn, shapes = functional(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return fn, draw(k2, shapes), args(k1)

    return Case(f"nnx_{name}", build)


_VOCABULARY = "positions along it are looked up"
_TWO_PASS = "a sum over it sees entries that are not zero"

LINEN = [
    Architecture(
        _linen("resnet20", lambda: models.ResNet(20, 4, 5), image(8)),
        free=(
            ("params/conv1/kernel", 3, 4),
            ("params/stage2_block0/conv2/kernel", 3, 2),
            ("params/stage3_block2/conv1/kernel", 3, 16),
        ),
        slow=True,
    ),
    Architecture(
        _linen("resnet56", lambda: models.ResNet(56, 4, 5), image(8)),
        free=(
            ("params/stage1_block0/conv1/kernel", 3, 4),
            # Option A pads by a quarter on each side: the middle is the narrow stage.
            ("params/stage1_block0/conv2/kernel", 3, 4),
            ("params/stage2_block0/conv2/kernel", 3, 2),
            ("params/stage3_block8/conv1/kernel", 3, 16),
        ),
        slow=True,
    ),
    Architecture(
        _linen(
            "resnet18",
            lambda: models.ImageNetResNet(18, 8, classes=5),
            image(32),
        ),
        free=(
            ("params/stage1_block0/conv1/conv/kernel", 3, 8),
            ("params/stem/conv/kernel", 3, 8),
            ("params/stage2_block0/short/conv/kernel", 3, 16),
            ("params/stage4_block1/conv2/conv/kernel", 3, 64),
        ),
        frozen=(
            ("params/stem/conv/kernel", 2, 3, "it is a dim of the inputs"),
            ("params/head/bias", 0, 5, "it is a dim of the outputs"),
        ),
        slow=True,
    ),
    Architecture(
        _linen(
            "resnet50",
            lambda: models.ImageNetResNet(50, 8, classes=5, layout=(2, 1, 1)),
            image(32),
        ),
        free=(
            ("params/stage1_block0/conv2/conv/kernel", 3, 8),
            ("params/stage1_block1/conv3/conv/kernel", 3, 32),
            ("params/stage3_block0/conv3/conv/kernel", 3, 128),
        ),
        slow=True,
    ),
    Architecture(
        _linen(
            "resnext",
            lambda: models.ImageNetResNet(50, 8, 4, 4, classes=5, layout=(2, 1)),
            image(16),
        ),
        free=(  # whole groups, and the width of each
            ("params/stage1_block0/conv2/conv/kernel", 3, 4),
            ("params/stage1_block0/conv1/conv/kernel", 3, 4),
            ("params/stage1_block1/conv3/conv/kernel", 3, 32),
        ),
    ),
    Architecture(
        _linen(
            "mobilenet_v1",
            lambda: models.MobileNet(5, layout=((8, 1), (12, 1), (16, 2))),
            image(8),
        ),
        free=(
            ("params/stem/kernel", 3, 8),
            ("params/block_0/pointwise/kernel", 3, 12),
        ),
    ),
    Architecture(
        _linen(
            "mobilenet_v2",
            lambda: models.MobileNetV2(
                5, 0.25, ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)), 1
            ),
            image(16),
        ),
        free=(
            ("params/block_1/depthwise/conv/kernel", 3, 48),
            ("params/block_2/project/conv/kernel", 3, 8),
            ("params/last/conv/kernel", 3, 1280),
        ),
        slow=True,
    ),
    Architecture(
        _linen("mobilenet_v3", lambda: models.MobileNetV3(5, "small", 0.25), image(32)),
        free=(
            ("params/block_4/squeeze/reduce/kernel", 1, 16),
            ("params/block_4/depthwise/conv/kernel", 3, 64),
            ("params/block_4/project/conv/kernel", 3, 16),
            ("params/hidden/kernel", 1, 256),
        ),
        slow=True,
    ),
    Architecture(
        _linen("efficientnet", lambda: models.EfficientNet(5, 0.25, 0.4), image(32)),
        free=(
            ("params/block_1/squeeze/reduce/kernel", 1, 2),
            ("params/block_1/depthwise/conv/kernel", 3, 48),
            ("params/block_4/project/conv/kernel", 3, 24),
        ),
        slow=True,
    ),
    Architecture(
        _linen(
            "convnext",
            lambda: models.ConvNeXt(5, ((8, 2), (16, 1)), 2, 1.0),
            image(16),
        ),
        free=(
            ("params/stage1_block0/up/kernel", 1, 32),
            ("params/stage1_block1/depthwise/kernel", 3, 8),
            ("params/stage2_block0/scale", 0, 16),
        ),
        slow=True,
    ),
    Architecture(
        _linen("unet", lambda: models.UNet(2, 4, 2), image(8)),
        free=(
            ("params/down_0_conv2/conv/kernel", 3, 4),
            ("params/up_0/kernel", 3, 4),
            ("params/middle_conv1/conv/kernel", 3, 16),
        ),
        slow=True,
    ),
    Architecture(
        _linen("vgg", linen_images.VGG, image(16)),
        free=(
            ("params/Conv_1/kernel", 3, 8),
            ("params/Dense_0/kernel", 0, 16),
            ("params/Dense_0/kernel", 1, 24),
        ),
        frozen=(("params/Dense_0/kernel", 0, 2, "a sliding window"),),
    ),
    Architecture(
        _linen("densenet", linen_images.DenseNet, image(8)),
        free=(
            ("params/Conv_0/kernel", 3, 8),
            ("params/Conv_2/kernel", 3, 4),
            ("params/Conv_1/kernel", 3, 16),
        ),
        slow=True,
    ),
    Architecture(
        _linen("yolo_c2f", linen_images.C2f, image(8)),
        free=(
            ("params/Conv_1/kernel", 3, 8),
            ("params/Conv_2/kernel", 3, 8),
            ("params/Conv_7/kernel", 2, 12),
        ),
    ),
    Architecture(
        _linen("shufflenet_v2", linen_images.ShuffleNetV2, image(8)),
        free=(
            ("params/Conv_0/kernel", 3, 8),
            ("params/Conv_2/kernel", 3, 4),
            ("params/Conv_3/kernel", 3, 8),
        ),
    ),
    Architecture(
        _linen("mlp_mixer", linen_images.MLPMixer, image(8)),
        free=(("params/Dense_0/kernel", 0, 12), ("params/Dense_3/kernel", 0, 24)),
        # The bias of a layer over positions is added to every channel.
        frozen=(("params/Conv_0/kernel", 3, 16, _TWO_PASS),),
    ),
    Architecture(
        _linen("swin", linen_images.Swin, image(16)),
        free=(
            ("params/embed/kernel", 3, 16),
            ("params/attn_0_1/relative", 1, 2),
            ("params/attn_0_1/proj/kernel", 0, 8),
            ("params/up_1_0/kernel", 1, 24),
            ("params/merge_1/kernel", 1, 32),
        ),
        frozen=(("params/attn_0_0/relative", 0, 49, _VOCABULARY),),
        slow=True,
    ),
    Architecture(
        _linen("vit", lambda: models.ViT(5, 4, 16, 2, 4, 24), image(16)),
        free=(
            ("params/class_token", 2, 16),
            ("params/layer_0/attn/query/kernel", 1, 4),
            ("params/layer_0/attn/query/kernel", 2, 4),
            ("params/layer_0/attn/value/kernel", 2, 4),
            ("params/layer_1/up/kernel", 1, 24),
        ),
    ),
    Architecture(
        _linen("bert", lambda: models.BERT(17, 8, 16, 2, 4, 24), words(6)),
        free=(
            ("params/embed/embedding", 1, 16),
            ("params/layer_0/attn/query/kernel", 1, 4),
            ("params/layer_1/down/kernel", 0, 24),
        ),
        frozen=(("params/embed/embedding", 0, 17, _VOCABULARY),),
    ),
    Architecture(
        _linen("gpt2", linen_text.GPT2, words(6)),
        free=(
            ("params/embed/embedding", 1, 16),
            ("params/attn_0/qkv/kernel", 1, 4),
            ("params/attn_0/proj/kernel", 0, 4),
            ("params/up_0/kernel", 1, 24),
        ),
        frozen=(("params/embed/embedding", 0, 17, _VOCABULARY),),
    ),
    Architecture(
        _linen("gpt2_two_pass", lambda: linen_text.GPT2(fast_variance=False), words(6)),
        free=(("params/attn_0/qkv/kernel", 1, 4), ("params/up_0/kernel", 1, 24)),
        frozen=(("params/embed/embedding", 1, 16, _TWO_PASS),),
    ),
    Architecture(
        _linen(
            "llama",
            lambda: models.Llama(
                models.LlamaConfig(17, 16, 24, 2, n_heads=4, n_kv_heads=2)
            ),
            words(6),
        ),
        free=(
            ("params/embed/embedding", 1, 16),
            ("params/layer_0/attn/q/kernel", 1, 2),  # key/value heads with their group
            ("params/layer_0/attn/v/kernel", 1, 4),  # what attention sums
            ("params/layer_0/gate/kernel", 1, 24),
        ),
        # What is turned by an angle of its own cannot move.
        frozen=(("params/layer_0/attn/q/kernel", 1, 2, "a constant|it counts"),),
    ),
    Architecture(
        _linen("t5", linen_text.T5, words(6, 5)),
        free=(
            ("params/embed/embedding", 1, 16),
            ("params/encoder/relative/embedding", 1, 4),  # all layers' heads
            ("params/decoder/cross_1/q/kernel", 1, 4),
            ("params/decoder/attn_0/v/kernel", 2, 4),
            ("params/encoder/gate_1/kernel", 1, 24),
        ),
        frozen=(("params/decoder/relative/embedding", 0, 8, _VOCABULARY),),
        slow=True,
    ),
    Architecture(
        _linen("lstm", lambda: linen_text.Recurrent(nn.OptimizedLSTMCell), words(6)),
        free=(("params/Embed_0/embedding", 1, 6), ("params/Dense_0/kernel", 0, 8)),
    ),
    Architecture(
        _linen("gru", lambda: linen_text.Recurrent(nn.GRUCell), words(6)),
        free=(("params/Embed_0/embedding", 1, 6), ("params/Dense_0/kernel", 0, 8)),
    ),
    Architecture(
        _linen("gru_both_ways", linen_text.BidirectionalGRU, words(6)),
        free=(("params/Dense_0/kernel", 0, 8), ("params/Dense_0/kernel", 0, 6)),
    ),
]

NNX = [
    Architecture(
        _nnx("resnet", nnx_models.ResNet, image(8)),
        free=(("stem/conv/kernel", 3, 8), ("blocks/0/conv3/conv/kernel", 3, 16)),
    ),
    Architecture(
        _nnx("resnext", lambda r: nnx_models.ResNet(r, groups=4), image(8)),
        free=(
            ("blocks/0/conv2/conv/kernel", 3, 4),
            ("blocks/0/conv2/conv/kernel", 3, 2),
        ),
        slow=True,
    ),
    Architecture(
        _nnx("mobilenet_v2", nnx_models.MobileNetV2, image(8)),
        free=(("blocks/1/depthwise/conv/kernel", 3, 24), ("head/kernel", 0, 12)),
    ),
    Architecture(
        _nnx("vgg", nnx_models.VGG, image(8)),
        free=(("convs/0/conv/kernel", 3, 8), ("hidden/kernel", 0, 12)),
    ),
    Architecture(
        _nnx("densenet", nnx_models.DenseNet, image(8)),
        free=(("head/kernel", 0, 8), ("head/kernel", 0, 4)),
    ),
    Architecture(
        _nnx("unet", nnx_models.UNet, image(8)),
        free=(("merge/conv/kernel", 2, 4), ("middle/conv/kernel", 3, 8)),
    ),
    Architecture(
        _nnx("vit", nnx_models.ViT, image(8)),
        free=(
            ("token", 2, 16),
            ("blocks/0/attn/qkv/kernel", 1, 4),
            ("blocks/1/up/kernel", 1, 24),
        ),
    ),
    Architecture(
        _nnx("bert", nnx_models.BERT, words(6)),
        free=(("embed/embedding", 1, 16), ("pool/kernel", 1, 12)),
    ),
    Architecture(
        _nnx("gpt2", nnx_models.GPT2, words(6)),
        free=(("embed/embedding", 1, 16), ("blocks/0/attn/out/kernel", 0, 4)),
        frozen=(("embed/embedding", 0, 17, _VOCABULARY),),
    ),
    Architecture(
        _nnx("llama", nnx_models.Llama, words(6)),
        free=(
            ("embed/embedding", 1, 16),
            ("blocks/0/attn/out/kernel", 0, 2),
            ("blocks/0/gate_up/kernel", 1, 24),
        ),
    ),
    Architecture(
        _nnx(
            "lstm",
            lambda r: nnx_models.Recurrent(nnx.OptimizedLSTMCell, 2, r),
            words(6),
        ),
        free=(("head/kernel", 0, 8), ("embed/embedding", 1, 6)),
    ),
    Architecture(
        _nnx("gru", lambda r: nnx_models.Recurrent(nnx.GRUCell, 1, r), words(6)),
        free=(("head/kernel", 0, 8), ("embed/embedding", 1, 6)),
    ),
]


def _rows(key):
    return (jr.normal(key, (2, 5, 6)),)


OTHERS = [
    Architecture(
        _equinox("vit", others.EqxViT, channels_first),
        free=(("attn/query_proj/weight", 0, 4), ("mlp/up/weight", 0, 24)),
        frozen=(("token", 1, 16, _TWO_PASS),),
        slow=True,
    ),
    Architecture(
        _equinox("resnet", others.EqxResNet, channels_first),
        free=(("stem/weight", 0, 8), ("short/weight", 0, 16)),
    ),
    Architecture(
        _equinox("gru", others.EqxGRU, words(6)),
        free=(("head/weight", 1, 8), ("embed/weight", 1, 6)),
    ),
    Architecture(
        _equinox("lstm", others.EqxLSTM, _rows), free=(("head/weight", 1, 8),)
    ),
    Architecture(
        _plain("gpt2", others.gpt2, others.GPT2_SHAPES, words(6)),
        free=(("layers/0/qkv", 1, 4), ("layers/0/out", 0, 4), ("layers/1/up", 1, 24)),
        frozen=(("embed", 1, 16, _TWO_PASS), ("embed", 0, 17, _VOCABULARY)),
    ),
    Architecture(
        _plain("resnext", others.resnext, others.RESNEXT_SHAPES, channels_first),
        free=(("stem", 0, 8), ("blocks/0/conv2", 0, 2), ("blocks/0/conv2", 1, 6)),
    ),
    Architecture(
        _plain(
            "mixture",
            others.mixture,
            others.MIXTURE_SHAPES,
            lambda k: (jr.normal(k, (2, 5, 8)),),
        ),
        free=(("up", 2, 12),),
        frozen=(("router", 1, 4, ""),),
    ),
    Architecture(
        _plain("gru", others.gru, others.GRU_SHAPES, _rows),
        free=(("state", 0, 8),),
    ),
]

ARCHITECTURES = [*LINEN, *NNX, *OTHERS]
