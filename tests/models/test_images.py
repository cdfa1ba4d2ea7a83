"""Laws that hold for every image model with batch norm."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff import models, tree
from tests.zoo import draw

MODELS = [
    models.CNN(stages=((8, 6), (10,)), classes=5),
    models.MobileNet(classes=5, layout=((8, 1), (12, 1), (16, 2))),
    models.ResNet(depth=8, width=4, classes=5),
    models.ImageNetResNet(18, width=4, classes=5, layout=(1, 1)),
    models.MobileNetV2(5, 0.25, layout=((1, 16, 1, 1), (6, 24, 2, 2))),
    models.UNet(classes=5, width=4, levels=2),
]
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)


def _setup(model, getkey, side=8):
    x = jr.normal(getkey(), (4, side, side, 3))
    return draw(getkey(), jax.eval_shape(model.init, getkey(), x)), x


@each_model
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (3, 28, 28, 1), (2, 32, 32, 3)])
def test_one_row_of_logits_for_each_image_of_any_size(model, shape, getkey):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, getkey(), x)
    pixels = shape[1:3] if isinstance(model, models.UNet) else ()
    assert logits.shape == (shape[0], *pixels, 5)


@each_model
def test_without_train_an_image_does_not_see_the_rest_of_the_batch(model, getkey):
    variables, x = _setup(model, getkey)
    apply = jax.jit(model.apply)
    together, alone = apply(variables, x), apply(variables, x[:1])
    assert jnp.allclose(together[:1], alone, atol=1e-5)


@each_model
def test_with_train_the_statistics_move_a_tenth_towards_the_batch(model, getkey):
    variables, x = _setup(model, getkey)
    _, new = jax.jit(lambda v, x: model.apply(v, x, True, mutable="batch_stats"))(
        variables, x
    )
    old, new = variables["batch_stats"], new["batch_stats"]
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert jnp.all(a != b)
    # A variance is at least 0, so it cannot fall by more than its tenth.
    old, new = tree.paths(old), tree.paths(new)
    for path in tree.match("**/var", list(old)):
        assert jnp.all(new[path] >= 0.899 * old[path])


@each_model
def test_with_train_the_units_of_the_image_do_not_matter(model, getkey):
    # Batch norm after the first convolution takes the scale away again.
    variables, x = _setup(model, getkey)
    apply = jax.jit(lambda v, x: model.apply(v, x, True, mutable="batch_stats")[0])
    assert jnp.allclose(
        apply(variables, 10 * x), apply(variables, 100 * x), rtol=1e-3, atol=1e-3
    )
