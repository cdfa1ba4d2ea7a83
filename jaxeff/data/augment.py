"""Random crops and flips as a pure function, so they run inside the jitted step."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key


def augment(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    *,
    pad: int = 4,
    flip: bool = True,
) -> Float[Array, "batch height width channels"]:
    """Each image shifted by up to `pad` pixels either way and, half of them, mirrored.

    The border shifted in is 0, which in normalised images is the mean colour.

    Args:
        key: one key for the whole batch.
        images: normalised.
        pad: the largest shift, in pixels; 0 does not shift.
        flip: mirror left and right with probability 1/2. Not for digits.

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
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    crop = lambda image, r, c: image[r[:, None], c[None, :]]
    return jax.vmap(crop)(padded, rows, columns)
