"""Pallas kernels, run step by step, and compiled for a chip that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization import kernels
from jaxeff.quantization.grids import named
from jaxeff.quantization.packing import pack
from jaxeff.quantization.products import round_activations

RNG = np.random.default_rng(0)


def weight(k, n, group, packed):
    """Codes as stored, scales, and the dense weight."""
    top = 127 if packed is None else 7
    codes = jnp.asarray(RNG.integers(-top, top + 1, (k, n)), jnp.int8)
    scale = jnp.asarray(RNG.uniform(0.5, 1, (k // group, n)), jnp.float32)
    dense = codes * jnp.repeat(scale, group, 0)
    if packed is not None:
        low = jax.lax.bitcast_convert_type(codes, jnp.uint8) & 15
        codes = pack(low, 4, packed)
    return codes, scale, dense


SHAPES = [(1, 256, 384), (8, 1024, 640), (300, 640, 256), (1, 1024, 1536)]
FAST = (0, 1)


@pytest.mark.parametrize("packed", [None, 0, 1])
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(s, marks=[] if i in FAST else pytest.mark.slow)
        for i, s in enumerate(SHAPES)
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_dense_weight(shape, group, packed, dtype):
    m, k, n = shape
    group, bits = group or k, 8 if packed is None else 4
    values, scale, dense = weight(k, n, group, packed)
    x = jnp.asarray(RNG.normal(size=(m, k)), dtype)
    assert kernels.unfit(k, n, bits, packed, group) == ""
    got = kernels.product(x, values, scale, bits=bits, packed=packed, interpret=True)
    want = jnp.matmul(x.astype(jnp.float32), dense, precision="highest")
    # Sums of k products in another order, with rounding errors that hardly ever all
    # point one way (Higham and Mary 2019, doi:10.1137/18M1226312). Also, a weight times
    # the scale of its group is rounded to the dtype of x.
    unit = 4 * k**0.5 * jnp.finfo(jnp.float32).eps
    if dtype == jnp.bfloat16 and group < k:
        unit += jnp.finfo(dtype).eps / 2
    sums = jnp.matmul(abs(x.astype(jnp.float32)), abs(dense), precision="highest")
    assert got.shape == (m, n) and got.dtype == jnp.float32
    assert (np.abs(got - want) <= unit * sums).all()


@pytest.mark.parametrize("rows, inputs", [(1, 64), (300, 768), (7, 2**17)])
def test_rows_are_rounded_as_elsewhere(rows, inputs):
    x = jnp.asarray(RNG.normal(size=(rows, inputs)), jnp.float32).at[0].mul(1e3)
    x = x.at[rows // 2].set(0) if rows > 1 else x
    codes, scale = kernels.round_rows(x, interpret=True)
    want, of = round_activations(x, [1], named("int8"))
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(scale, of)
    assert codes.dtype == jnp.int8 and scale.shape == (rows, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("number", [jnp.nan, jnp.inf, -jnp.inf, 1e-37])
def test_what_is_not_finite_or_hardly_a_number_is_rounded_as_elsewhere(number, dtype):
    x = jnp.zeros((3, 64), dtype).at[1, 2].set(number).at[2].set(1)
    codes, scale = kernels.round_rows(x, interpret=True)
    want, of = round_activations(x, [1], named("int8"))
    np.testing.assert_array_equal(scale, of)
    np.testing.assert_array_equal(codes * scale, want * of)


@pytest.mark.parametrize(
    "case, why",
    [
        ((768, 700, 8, None, 768), "no tiles of multiples of 128 fill"),
        ((256, 256, 3, None, 256), "no bytes or halves"),
        ((256, 255, 4, 1, 256), "no pairs"),
        ((1024, 256, 8, None, 1024 // 3), "groups of 341 do not fill a tile"),
    ],
)
def test_what_does_not_fit_is_said(case, why):
    assert why in kernels.unfit(*case)


@pytest.fixture
def tpu(tpus):
    return jax.sharding.SingleDeviceSharding(tpus("v5e:2x2")[0])


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("packed, group", [(None, 4096), (0, 128), (1, 32)])
def test_the_product_compiles_for_a_tpu(tpu, rows, dtype, packed, group):
    k, n, bits = 4096, 11008, 8 if packed is None else 4
    shape = lambda s, dtype: jax.ShapeDtypeStruct(s, dtype, sharding=tpu)
    sizes = [k, n]
    if packed is not None:
        sizes[packed] //= 2
    run = lambda x, w, s: kernels.product(x, w, s, bits=bits, packed=packed)
    compiled = (
        jax.jit(run)
        .lower(
            shape((rows, k), dtype),
            shape(sizes, jnp.int8 if bits == 8 else jnp.uint8),
            shape((k // group, n), jnp.float32),
        )
        .compile()
    )
    assert "tpu_custom_call" in compiled.as_text()


def test_rounding_compiles_for_a_tpu(tpu):
    x = jax.ShapeDtypeStruct((300, 4096), jnp.bfloat16, sharding=tpu)
    assert "tpu_custom_call" in kernels.round_rows.lower(x).compile().as_text()
