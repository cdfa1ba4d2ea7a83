"""Errors of the formats on standard normal weights, as others measured them.

The mean magnitude of the error over that of the weights, which come in bfloat16. The
figures are those of qwix's tests (github.com/google/qwix), with the definition of
each found by computing it anew; of its 8-bit integers there the arithmetic is in
bfloat16 as well, so only the range that float32 gives is known.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.quantization import (
    Format,
    int4,
    int8,
    Linear,
    mxfp4,
    mxfp8,
    nf4,
    nvfp4,
    quantize_array,
)

# A scale for each column of 512, where there is no group.
PUBLISHED = {
    "int8": (int8, 0.00735),
    "int4, largest magnitude at 7.5": (Format(Linear(4, narrow=False)), 0.12256),
    "int4, largest magnitude at 7": (int4, 0.1287),
    "nf4, 32": (nf4.grouped(32), 0.0847),
    "nf4, 32 x 16": (nf4.tiled(32, 16), 0.09863),
    "mxfp8": (mxfp8, 0.02305),
    "mxfp4": (mxfp4, 0.10645),
    "nvfp4": (nvfp4, 0.08936),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_error_is_that_which_is_published(name):
    fmt, published = PUBLISHED[name]
    w = jr.normal(jr.key(0), (512, 512), jnp.bfloat16).astype(jnp.float32)
    off = jax.jit(lambda w: quantize_array(w, fmt, (0,)).dense() - w)(w)
    error = jnp.abs(off).mean() / jnp.abs(w).mean()
    assert float(error) == pytest.approx(published, rel=0.02)
