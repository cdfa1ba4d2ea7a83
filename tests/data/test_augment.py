import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.data import augment


def test_each_image_is_a_crop_of_the_padded_image_or_of_its_mirror(getkey):
    images = jr.normal(getkey(), (16, 5, 6, 2))
    out = jax.jit(augment, static_argnames=("pad", "flip"))(getkey(), images, pad=2)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    mirrored = 0
    for image, result in zip(padded, out, strict=True):
        crops = [image[y : y + 5, x : x + 6] for y in range(5) for x in range(5)]
        plain = any(jnp.array_equal(result, c) for c in crops)
        mirror = any(jnp.array_equal(result, c[:, ::-1]) for c in crops)
        assert plain or mirror
        mirrored += mirror
    assert 0 < mirrored < 16


def test_nothing_to_do_changes_nothing(getkey):
    images = jr.normal(getkey(), (4, 5, 5, 3))
    assert jnp.array_equal(augment(getkey(), images, pad=0, flip=False), images)


def test_the_key_decides_all(getkey):
    images = jr.normal(getkey(), (8, 5, 5, 1))
    one, other = getkey(), getkey()
    assert jnp.array_equal(augment(one, images), augment(one, images))
    assert not jnp.array_equal(augment(one, images), augment(other, images))


def test_gradients_reach_the_pixels_that_were_kept(getkey):
    images, key = jr.normal(getkey(), (3, 4, 4, 1)), getkey()
    grads = jax.grad(lambda x: augment(key, x, pad=1).sum())(images)
    kept = jnp.count_nonzero(augment(key, images, pad=1), axis=(1, 2, 3))
    assert jnp.array_equal(grads.sum((1, 2, 3)), kept.astype(jnp.float32))


def test_a_negative_pad_is_an_error(getkey):
    with pytest.raises(ValueError, match="0 or more, got -1"):
        augment(getkey(), jnp.zeros((1, 2, 2, 1)), pad=-1)
