import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.data import augment, augmentation, Dataset, digits


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


def test_what_is_shifted_in_is_the_border(getkey):
    images = jnp.zeros((64, 3, 3, 2))
    border = np.array([2.0, -3.0])
    out = augment(getkey(), images, pad=1, flip=False, border=border)
    new = jnp.abs(out).sum(-1) > 0
    assert new.any() and not new.all()
    assert jnp.array_equal(out[new], jnp.broadcast_to(border, out[new].shape))


def dataset(name):
    """Images of one black pixel each."""
    mean, std = (0.3, 0.4), (0.2, 0.5)
    black = -np.array(mean) / np.array(std)
    images = np.broadcast_to(black, (64, 2, 2, 2)).astype(np.float32)
    return Dataset(name, images, np.zeros(64, np.int32), ("a",), mean, std)


def test_black_stays_black_in_fashion_mnist_but_not_in_photographs(getkey):
    for name, same in (("fashion_mnist/train", True), ("cifar10/train", False)):
        data = dataset(name)
        change = augmentation(data)
        assert change is not None
        out = change(getkey(), jnp.asarray(data.images))
        assert bool(jnp.allclose(out, data.images)) == same


def test_digits_are_left_as_they_are():
    assert augmentation(digits()[0]) is None
