import functools

import jax
import jax.numpy as jnp
import pytest

from jaxeff.models import LAYOUT_224, LAYOUT_SMALL, MobileNet


def _shapes(model, side, channels=3):
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


# Table 6 of the paper, in millions.
@pytest.mark.parametrize("width, millions", [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3)])
def test_the_papers_layout_has_the_papers_parameters(width, millions):
    params = _shapes(MobileNet(classes=1000, width=width, layout=LAYOUT_224), 224)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == millions


def test_a_depthwise_kernel_sees_one_channel():
    params = _shapes(MobileNet(), 8)
    for i, (channels, _) in enumerate(LAYOUT_SMALL[:-1]):
        kernel = params[f"block_{i}"]["depthwise"]["kernel"]
        assert kernel.shape == (3, 3, 1, channels)


def test_width_leaves_at_least_eight_channels():
    params = _shapes(MobileNet(width=0.01), 8)
    assert params["stem"]["kernel"].shape == (3, 3, 3, 8)


def test_strides_divide_the_image():
    model = MobileNet(layout=((8, 2), (8, 1), (8, 2)))
    x = jax.ShapeDtypeStruct((1, 13, 16, 3), jnp.float32)
    init = functools.partial(
        model.init_with_output, capture_intermediates=True, mutable=True
    )
    _, seen = jax.eval_shape(init, jax.random.key(0), x)
    (out,) = seen["intermediates"]["block_1"]["__call__"]
    assert out.shape == (1, 4, 4, 8)  # 13 / 4 and 16 / 4, rounded up
