"""The sizes of models by their papers, against the published implementations."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff import models

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_padding_is_not_seen_by_the_words",
}

IMAGE, WORDS = ((1, 224, 224, 3), jnp.float32), ((1, 8), jnp.int32)

# The parameters of torchvision's models of the same name, of Hugging Face's
# BertForMaskedLM, and of the U-Net with batch norm that is used everywhere.
PUBLISHED = {
    "resnet18": (models.ImageNetResNet(18), IMAGE, 11_689_512),
    "resnet50": (models.ImageNetResNet(50), IMAGE, 25_557_032),
    "resnext50_32x4d": (
        models.ImageNetResNet(50, groups=32, group_width=4),
        IMAGE,
        25_028_904,
    ),
    "mobilenet_v2": (models.MobileNetV2(1000), IMAGE, 3_504_872),
    "mobilenet_v3_large": (models.MobileNetV3(1000), IMAGE, 5_483_032),
    "mobilenet_v3_small": (models.MobileNetV3(1000, "small"), IMAGE, 2_542_856),
    "efficientnet_b0": (models.EfficientNet(1000), IMAGE, 5_288_548),
    "efficientnet_b3": (models.EfficientNet(1000, 1.2, 1.4), IMAGE, 12_233_232),
    "convnext_tiny": (models.ConvNeXt(1000), IMAGE, 28_589_128),
    "vit_b_16": (models.ViT(1000, 16, 768, 12, 12), IMAGE, 86_567_656),
    "bert_base": (models.BERT(30_522, 512, 768, 12, 12), WORDS, 109_514_298),
    "unet": (models.UNet(2), IMAGE, 31_037_698),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_parameters_that_were_published(name):
    model, (shape, dtype), count = PUBLISHED[name]
    x = jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_a_model_that_cannot_be_says_why():
    image = jnp.zeros((1, 9, 9, 3))
    for model, x, why in [
        (models.ImageNetResNet(20), image, "got depth=20"),
        (models.ImageNetResNet(18, groups=2), image, "Groups belong to bottlenecks"),
        (models.ViT(patch=4), image, "Patches of 4 pixels must cover"),
        (models.ViT(patch=3, d_model=8, n_heads=3), image, "n_heads must divide"),
        (models.UNet(levels=2), image, "multiples of 4, got 9 x 9"),
        (models.BERT(max_len=4), jnp.zeros((1, 5), int), "up to max_len=4, got 5"),
    ]:
        with pytest.raises(ValueError, match=why):
            jax.eval_shape(model.init, jax.random.key(0), x)


def test_padding_is_not_seen_by_the_words(getkey):
    model = models.BERT(17, 8, 16, 2, 4)
    words = jax.random.randint(getkey(), (2, 6), 0, 17)
    variables = model.init(getkey(), words)
    mask = jnp.arange(6)[None] < jnp.array([[4], [4]])
    apply = jax.jit(model.apply)
    whole = apply(variables, words, mask)[:, :4]
    short = apply(variables, words[:, :4])
    assert jnp.allclose(whole, short, atol=1e-5)
