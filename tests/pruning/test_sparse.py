"""Leaves that store what is kept, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax import lax

from jaxeff import lift, trace
from jaxeff.program import dense, describe, keep, lift_report, rebuild, relative_error
from jaxeff.pruning import bitmask_array, block_array, nm_array
from jaxeff.pruning.bits import pack_bits, unpack_bits
from jaxeff.pruning.lowest import drop_n_of_m, NM
from jaxeff.tree import combine, partition, tree_bytes
from tests.program.shrinking import distance

RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def nm(shape, n=2, m=4, axis=-1, dtype=jnp.float32):
    """A dense weight with n of m along a dim, and its leaf."""
    w = jnp.moveaxis(array(*shape, dtype=dtype), axis, -1)
    w = jnp.where(drop_n_of_m(jnp.abs(w), NM(n, m)), 0, w)
    w = jnp.moveaxis(w, -1, axis)
    return w, nm_array(w, n, m, axis)


def bitmask(shape, lead=0, dtype=jnp.float32):
    w = array(*shape, dtype=dtype)
    w = jnp.where(jnp.asarray(RNG.random(shape) < 0.6), 0, w)
    return w, bitmask_array(w, lead)


def blocks(shape, block=(4, 2), lead=0, dtype=jnp.float32):
    *first, rows, cols = shape
    grid = (*first, rows // block[0], cols // block[1])
    kept = np.kron(RNG.random(grid) < 0.5, np.ones(block)) > 0
    w = jnp.where(jnp.asarray(kept), array(*shape, dtype=dtype), 0)
    return w, block_array(w, block, lead)


MATRICES = {
    "2:4 of inputs": lambda **k: nm((16, 8), axis=0, **k),
    "2:4 of outputs": lambda **k: nm((16, 8), axis=1, **k),
    "1:16": lambda **k: nm((16, 8), 1, 16, axis=0, **k),
    "bitmask": lambda **k: bitmask((16, 8), **k),
    "blocks": lambda **k: blocks((16, 8), **k),
}
matrices = pytest.mark.parametrize("make", MATRICES.values(), ids=list(MATRICES))
STACKS = {
    "2:4": lambda: nm((3, 16, 8), axis=1),
    "bitmask": lambda: bitmask((3, 16, 8), lead=1),
    "blocks": lambda: blocks((3, 16, 8), lead=1),
}
stacks = pytest.mark.parametrize("make", STACKS.values(), ids=list(STACKS))


@pytest.mark.slow
@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    n=st.sampled_from([0, 1, 7, 16]),
    seed=st.integers(0, 9),
)
def test_bits_come_back(bits, n, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (2, n)).astype(np.uint8)
    packed = pack_bits(jnp.asarray(values), bits)
    assert packed.shape == (2, -(-n * bits // 8))
    assert np.array_equal(unpack_bits(packed, bits, n), values)


@matrices
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_is_the_array_bit_for_bit(make, dtype):
    w, leaf = make(dtype=dtype)
    assert leaf.dtype == w.dtype and leaf.shape == w.shape
    assert np.array_equal(leaf.dense(), w)
    assert relative_error(w, leaf) == 0


@matrices
@pytest.mark.parametrize(
    "fn, native",
    [
        (lambda p, x: x @ p["w"], True),
        (lambda p, x: p["w"].T @ x.T, True),
        (lambda p, x: jnp.einsum("io,...i->o...", p["w"], x[None]), True),
        (lambda p, x: x[:, :8] @ p["w"].T, True),
        (lambda p, x: x[:, :8] @ p["w"][8:, 4:], True),
        (lambda p, x: p["w"][jnp.array([3, 0, 15])], True),
        (lambda p, x: jnp.sin(p["w"]), False),
    ],
    ids=["plain", "transposed", "einsum", "outputs", "sliced", "look-up", "other"],
)
def test_it_computes_what_the_dense_weight_does(make, fn, native):
    w, leaf = make()
    x = array(5, 16)
    want = fn({"w": w}, x)
    got = jax.jit(lift(fn))({"w": leaf}, x)
    assert got.dtype == want.dtype and distance(got, want) < 1e-6
    # Half of a group of 16 is no group.
    native = native and not (leaf.format == "1:16" and got.shape == (5, 4))
    assert all(e.native is native for e in lift_report(fn, {"w": leaf}, x))


@matrices
def test_products_have_the_dtype_they_are_asked_for(make):
    w, leaf = make(dtype=jnp.bfloat16)
    x = array(5, 16, dtype=jnp.bfloat16)
    fn = lambda p, x: (
        x @ p["w"],
        jnp.dot(x, p["w"], preferred_element_type=jnp.float32),
    )
    for got, want in zip(lift(fn)({"w": leaf}, x), fn({"w": w}, x), strict=True):
        assert got.dtype == want.dtype
        assert distance(got.astype(jnp.float32), want.astype(jnp.float32)) < 1e-2


@pytest.mark.parametrize(
    "make",
    [lambda: nm((3, 3, 8, 6), axis=2), lambda: bitmask((3, 3, 8, 6))],
    ids=["2:4", "bitmask"],
)
def test_it_convolves(make):
    w, leaf = make()
    x = array(2, 5, 5, 8)
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert distance(lift(fn)({"w": leaf}, x), fn({"w": w}, x)) < 1e-6
    assert all(e.native for e in lift_report(fn, {"w": leaf}, x))


@stacks
def test_a_scan_slices_it(make):
    w, leaf = make()
    back = array(8, 16)

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w @ back), x @ w.mT.mT), x, p["w"])

    x = array(4, 16)
    for got, want in zip(lift(fn)({"w": leaf}, x), fn({"w": w}, x), strict=True):
        assert distance(got, want) < 1e-5
    assert all(e.native for e in lift_report(fn, {"w": leaf}, x))


@matrices
def test_gradients_are_those_of_what_is_kept(make):
    w, leaf = make()
    x = array(5, 16)
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]))
    train, frozen = partition({"w": leaf})
    assert all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(train))
    got = jax.grad(lambda t: lift(loss)(combine(t, frozen), x))(train)
    step = jax.tree.map(lambda a, g: a - 1e-3 * g, train, got)
    change = np.asarray(dense(combine(step, frozen))["w"] - w)
    want = np.where(w == 0, 0, jax.grad(loss)({"w": w}, x)["w"])
    # A stored block, or a group of fewer, may hold zeros, and these train too.
    kept = np.asarray(w != 0)
    assert distance(change[kept], -1e-3 * want[kept]) < 1e-3
    assert (change[~kept] == 0).mean() > 0.9


@matrices
@pytest.mark.parametrize("dim", [0, 1])
def test_it_loses_indices(make, dim):
    w, leaf = make()
    mask = np.arange(w.shape[dim]) // (8 if w.shape[dim] == 16 else 4) == 0
    if leaf.format == "1:16" and dim == 0:
        with pytest.raises(ValueError, match="shrink before"):
            keep(leaf, dim, mask)
        return
    small = keep(leaf, dim, mask)
    assert np.array_equal(dense(small), np.compress(mask, w, axis=dim))
    assert tree_bytes(small) < tree_bytes(leaf)


@stacks
def test_a_stack_loses_layers_and_indices(make):
    w, leaf = make()
    for dim, mask in [
        (0, np.array([True, False, True])),
        (1, np.arange(16) >= 8),
        (2, np.arange(8) < 4),
    ]:
        want = np.compress(mask, w, axis=dim)
        assert np.array_equal(dense(keep(leaf, dim, mask)), want)


@pytest.mark.parametrize(
    "shape, new, axis, native",
    [
        ((16, 8), (16, 2, 4), 0, True),
        ((2, 8, 6), (16, 6), 1, True),
        ((16, 6), (2, 8, 6), 0, True),
        ((16, 6), (8, 2, 6), 0, False),
        ((8, 2, 6), (16, 6), 0, False),
        ((1, 16, 6), (16, 6), 1, True),
        ((16, 6), (16, 1, 6), 0, True),
        ((5, 4, 3), (20, 3), 1, True),  # 2 places in a byte that 20 would fill
    ],
    ids=str,
)
def test_groups_survive_a_reshape_that_keeps_them_together(shape, new, axis, native):
    w, leaf = nm(shape, axis=axis)
    view = leaf.reshape(new)
    assert (view is not NotImplemented) is native
    if native:
        assert np.array_equal(view.dense(), w.reshape(new))
        assert view.shape == new


def test_bitmasks_are_seen_in_other_forms():
    w, leaf = bitmask((2, 4, 6), lead=1)
    turned = leaf.transpose((0, 2, 1))
    assert np.array_equal(turned.dense(), w.transpose(0, 2, 1))
    assert np.array_equal(turned.transpose((0, 2, 1)).dense(), w)
    assert np.array_equal(leaf.reshape((2, 24)).dense(), w.reshape(2, 24))
    assert leaf.transpose((1, 0, 2)) is NotImplemented
    assert leaf.reshape((8, 6)) is NotImplemented
    assert turned.reshape((2, 24)) is NotImplemented


def test_blocks_cost_what_is_stored():
    w = jnp.zeros((64, 64)).at[:16, 16:32].set(1).at[32:48, :16].set(2)
    fn = lambda p, x: x @ p["w"]
    x = array(8, 64)
    leaf = block_array(w, (16, 16))
    assert distance(lift(fn)({"w": leaf}, x), x @ w) < 1e-6
    products = lambda w: sum(s.flops for s in trace(lift(fn), {"w": w}, x).sites)
    assert products(leaf) == products(w) * 2 / 16


@pytest.mark.parametrize(
    "make",
    [*MATRICES.values(), *STACKS.values()],
    ids=[*MATRICES, *(f"stacked {name}" for name in STACKS)],
)
def test_it_survives_flattening_and_saving(make):
    w, leaf = make()
    leaves, treedef = jax.tree.flatten(leaf)
    again = jax.tree.unflatten(treedef, leaves)
    assert np.array_equal(again.dense(), w)
    about = describe(lift(lambda p: p), {"w": leaf})
    _, params = rebuild(about, lambda p: p, {"w": w})
    stored = jax.tree.structure(params)
    assert stored == jax.tree.structure({"w": leaf})
    assert np.array_equal(jax.tree.unflatten(stored, leaves)["w"].dense(), w)


def test_half_of_the_weights_take_17_bits_each():
    for w, leaf in (nm((64, 64), axis=0), bitmask((64, 64))):
        kept = max(int((w != 0).sum()), 1)
        assert tree_bytes(leaf) == 4 * kept + 64 * 64 // 8
    w, leaf = blocks((64, 64), (16, 16))
    stored = leaf.places.shape[0]
    assert tree_bytes(leaf) == stored * (16 * 16 * 4 + 4)


@pytest.mark.parametrize("special", [np.inf, np.nan, -0.0])
@pytest.mark.parametrize("n", [2, 4])
def test_what_is_not_a_number_stays_where_it_is(special, n):
    w = jnp.zeros((8, 4)).at[2, 1].set(special).at[5, 3].set(1)
    for leaf in (nm_array(w, n, 4, 0), bitmask_array(w), block_array(w, (2, 2))):
        assert np.array_equal(leaf.dense(), w, equal_nan=True)


def test_an_empty_pattern_is_stored_too():
    w = jnp.zeros((8, 4))
    for leaf in (nm_array(w, 1, 4, 0), bitmask_array(w), block_array(w, (2, 2))):
        assert np.array_equal(leaf.dense(), w)
        assert distance(leaf.dense() + 1, w + 1) == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nm_array(jnp.ones((6, 3)), 2, 4, 0), "multiple of 4, got 6"),
        (lambda: nm_array(jnp.ones((8, 3)), 5, 4, 0), "n = 5"),
        (lambda: nm_array(jnp.ones((8, 3)), 2, 4, 0), "a group has 4"),
        (lambda: block_array(jnp.ones((6, 3)), (4, 3)), "got \\(6, 3\\)"),
        (lambda: block_array(jnp.ones((2, 6, 3)), (2, 3)), "got \\(2, 6, 3\\)"),
    ],
    ids=["length", "n", "full", "block", "dims"],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
