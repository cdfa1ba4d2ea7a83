"""Random crops and flips as a pure function, so they run inside the jitted step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .dataset import Dataset


def augment(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    *,
    pad: int = 4,
    flip: bool = True,
    border: float | Array | np.ndarray = 0.0,
) -> Float[Array, "batch height width channels"]:
    """Each image shifted by up to `pad` pixels either way and, half of them, mirrored.

    Args:
        key: one key for the whole batch.
        images: normalised.
        pad: the largest shift, in pixels; 0 does not shift.
        flip: mirror left and right with probability 1/2. Not for digits.

        border: what is shifted in, one number or one for each channel; 0 is the mean
            colour of normalised images.

    Source: pad and crop as in Lee et al. 2015, arXiv:1409.5185, section 4.
    """
    if pad < 0:
        raise ValueError(f"pad counts pixels, so it is 0 or more, got {pad}.")
    n, height, width, _ = images.shape
    shift_key, flip_key = jr.split(key)
    dy, dx = jr.randint(shift_key, (2, n), 0, 2 * pad + 1)
    rows = dy[:, None] + jnp.arange(height)[None, :]
    columns = dx[:, None] + jnp.arange(width)[None, :]
    if flip:
        mirrored = jr.bernoulli(flip_key, 0.5, (n, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    wide = (n, height + 2 * pad, width + 2 * pad, images.shape[3])
    padded = jnp.broadcast_to(jnp.asarray(border, images.dtype), wide)
    padded = padded.at[:, pad : pad + height, pad : pad + width].set(images)
    crop = lambda image, r, c: image[r[:, None], c[None, :]]
    return jax.vmap(crop)(padded, rows, columns)


def augmentation(data: Dataset) -> Callable[..., Array] | None:
    """The `augment(key, images)` that keeps each image of a data set in its class.

    None for handwritten digits, and for any data set that is not ours to judge. What
    is shifted into a photograph is the mean colour; into a shirt on black, black.
    """
    match data.name.split("/")[0]:
        case "cifar10":
            return functools.partial(augment, pad=4)
        case "fashion_mnist":
            black = -np.array(data.mean) / np.array(data.std)
            return functools.partial(augment, pad=2, border=black)
    return None
