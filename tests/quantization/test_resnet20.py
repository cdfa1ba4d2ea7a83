"""The trained ResNet-20 on all 10,000 CIFAR-10 test images, without fine-tuning."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff.data import cifar10
from jaxeff.models.pretrained import load_resnet20
from jaxeff.quantization import int4, int8, quantize, w8a8

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.slow
def test_8_bits_cost_the_trained_resnet_at_most_a_third_of_a_point(data_dir):
    path = data_dir("resnet20_cifar10") / "resnet20.safetensors"
    _, test = cifar10(data_dir("cifar10"), mean=MEAN, std=STD)
    model, params = load_resnet20(path)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    models = {"float32": (model.apply, params)}
    for fmt in (int8, w8a8, int4):
        formats = {"**/kernel": fmt}
        models[fmt.name] = quantize(model.apply, params, image, formats=formats)

    correct = {}
    for name, (fn, weights) in models.items():
        count = jax.jit(lambda p, x, y, fn=fn: (fn(p, x).argmax(-1) == y).sum())
        correct[name] = sum(
            int(count(weights, test.images[i : i + 500], test.labels[i : i + 500]))
            for i in range(0, len(test), 500)
        )
    assert correct["float32"] == 9173  # the published error, 8.27 %
    assert correct["int8"] >= 9173 - 30
    assert correct["w8a8"] >= 9173 - 30
    assert correct["int4"] >= 9173 - 200
