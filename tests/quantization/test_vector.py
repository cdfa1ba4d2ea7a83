"""Weights as codes into codebooks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.program import describe, lift, lift_report, rebuild
from jaxeff.quantization import Codebook, quantize, VectorArray
from jaxeff.quantization.kmeans import kmeans, nearest
from jaxeff.quantization.learn import learn, refine

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_stages_are_learned_together",
    "test_more_bits_and_more_stages_are_nearer",
}

FORMATS = [
    Codebook(4),
    Codebook(3, scaled=False),
    Codebook(5, dim=2),
    Codebook(4, dim=4, stages=2),
    Codebook(3, outputs=6),
]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
run = jax.jit(learn, static_argnums=(1, 2, 3))


def numpy_dense(q, along):
    """Vectors picked by loops; `along` counts from the front."""
    shape = list(q.shape)
    shape[along] //= q.dim
    codes, books = np.asarray(q.plain()), np.asarray(q.books)
    out = np.zeros((*shape, q.dim), np.float32)
    for at in np.ndindex(*shape):
        places = zip(at, shape, books.shape[: len(shape)], strict=True)
        book = books[tuple(i * k // n for i, n, k in places)]
        out[at] = sum(book[s, codes[at][s]] for s in range(q.stages))
    dense = np.moveaxis(out, -1, along + 1).reshape(q.shape)
    return dense if q.scale is None else dense * np.asarray(q.scale)


@by_name
def test_a_weight_is_the_vectors_its_codes_pick(fmt, normal):
    w = normal(16, 12) * jnp.linspace(0.1, 10, 12)[None]
    q = run(w, fmt, (0,))
    assert (q.shape, q.dtype, q.stages, q.dim) == (
        w.shape,
        w.dtype,
        fmt.stages,
        fmt.dim,
    )
    np.testing.assert_allclose(q.dense(), numpy_dense(q, 0), rtol=1e-5, atol=1e-6)


def test_it_takes_the_bits_it_claims(normal):
    for fmt, bits in ((Codebook(4), 4), (Codebook(4, dim=4, stages=2), 2)):
        q = run(normal(64, 48), fmt, (0,))
        codes = q.codes.size * q.codes.dtype.itemsize
        assert 8 * codes == bits * 64 * 48
        beside = 4 * (fmt.stages * 16 * fmt.dim + 48)
        assert tree.tree_bytes(q) == codes + beside


def test_more_bits_and_more_stages_are_nearer(normal):
    w = normal(64, 48)
    error = lambda fmt: float(jnp.linalg.norm(run(w, fmt, (0,)).dense() - w))
    assert error(Codebook(2)) > error(Codebook(3)) > 1.5 * error(Codebook(4))
    assert error(Codebook(4, dim=2)) > error(Codebook(4, dim=2, stages=2))


def test_stages_are_learned_together(normal):
    x, weight = normal(400, 3), jnp.abs(normal(400, 3)) + 0.1
    first = kmeans(x, weight, k=8, key=jax.random.key(0))
    code = nearest(x, weight, first)[0]
    second = kmeans(x - first[code], weight, k=8, key=jax.random.key(1))
    codes = jnp.stack([code, nearest(x - first[code], weight, second)[0]], 1)
    books = jnp.stack([first, second])

    def lost(books, codes):
        made = books[0][codes[:, 0]] + books[1][codes[:, 1]]
        return float(jnp.sum(weight * (x - made) ** 2))

    losses = [lost(*refine(x, weight, books, codes, rounds=n)) for n in (0, 1, 3, 8)]
    assert losses[0] == pytest.approx(lost(books, codes))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


def test_no_code_of_several_can_be_changed_alone_for_a_nearer_sum(normal):
    w = normal(48, 30)
    q = learn(w, Codebook(3, dim=3, stages=2, scaled=False), (0,))
    vectors = w.reshape(16, 3, 30).transpose(0, 2, 1).reshape(-1, 3)
    codes, books = q.plain().reshape(-1, 2), q.books.reshape(2, 8, 3)
    sums = books[0][:, None] + books[1][None]  # every pair
    off = jnp.sum((vectors[:, None, None] - sums[None]) ** 2, -1)
    rows = jnp.arange(len(vectors))
    chosen = off[rows, codes[:, 0], codes[:, 1]]
    for best in (off[rows, :, codes[:, 1]].min(1), off[rows, codes[:, 0]].min(1)):
        assert (chosen <= best * 1.0001 + 1e-6).all()


def test_numbers_that_repeat_are_kept_exactly(normal):
    w = jnp.asarray(np.random.default_rng(0).choice([-2.0, 0, 0.5, 3], (32, 8)))
    q = run(w.astype(jnp.float32), Codebook(2, scaled=False), (0,))
    np.testing.assert_allclose(q.dense(), w, atol=1e-6)


def test_what_counts_more_is_nearer(normal):
    first = (jnp.arange(32) < 8)[:, None]
    w = jnp.where(first, 3 + 0.3 * normal(32, 8), normal(32, 8))
    counts = jnp.where(first, 100.0, 1.0)
    plain = run(w, Codebook(2), (0,))
    weighed = learn(w, Codebook(2), (0,), importance=counts)
    error = lambda q: jnp.sum((q.dense() - w)[:8] ** 2)
    assert error(weighed) < 0.5 * error(plain)


CONV = dict(window_strides=(1, 1), padding="SAME")
USES = {
    "product": (lambda w, x: x @ w, (7, 16), (16, 12), (0,)),
    "one row": (lambda w, x: x @ w, (16,), (16, 12), (0,)),
    "weight first": (lambda w, x: w @ x, (16, 3), (12, 16), (1,)),
    "turned": (lambda w, x: x @ w.T, (2, 5, 16), (12, 16), (1,)),
    "convolution": (
        lambda w, x: jax.lax.conv(x, w, (1, 1), "SAME"),
        (2, 8, 5, 5),
        (12, 8, 3, 3),
        (1, 2, 3),
    ),
    "look-up": (lambda w, x: w[x.astype(int)], (4,), (9, 16), (1,)),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("fmt", [Codebook(4), Codebook(5, dim=4)], ids=lambda f: f.name)
def test_it_multiplies_as_its_dense_weight(fmt, name, normal):
    fn, x_shape, w_shape, contract = USES[name]
    if name == "convolution" and fmt.dim > 1:
        fmt = dataclasses.replace(fmt, dim=3)
    x = jnp.array([0.0, 3, 8, 9]) if name == "look-up" else normal(*x_shape)
    q = run(normal(*w_shape), fmt, contract)
    assert [e.native for e in lift_report(fn, q, x)] == [True]
    ours, expected = jax.jit(lambda q, x: (lift(fn)(q, x), fn(q.dense(), x)))(q, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_single_row_never_meets_the_dense_weight(normal):
    q = run(normal(256, 512), Codebook(4, dim=8), (0,))
    fn = lift(lambda w, x: x @ w)
    largest = lambda x: max(
        v.aval.size for e in jax.make_jaxpr(fn)(q, x).eqns for v in e.outvars
    )
    assert largest(normal(1, 256)) < 256 * 512 / 4
    assert largest(normal(64, 256)) >= 256 * 512


def test_slices_along_a_leading_dim_are_the_slices_of_dense(normal):
    q = run(normal(3, 16, 6), Codebook(3, dim=2), (1,), (0,))
    assert q.books.shape[:3] == (3, 1, 1)
    slices = jax.vmap(lambda q: q.dense())(q)
    np.testing.assert_array_equal(slices, q.dense())
    turned = q.transpose((0, 2, 1))
    np.testing.assert_array_equal(turned.dense(), q.dense().transpose(0, 2, 1))


def test_indices_can_leave_where_they_are_not_coded_together(normal):
    q = run(normal(16, 12), Codebook(4, dim=2), (0,))
    mask = np.arange(12) % 3 > 0
    np.testing.assert_array_equal(q.keep(1, mask).dense(), q.dense()[:, mask])
    assert q.keep(0, np.arange(16) > 3) is NotImplemented


def test_a_model_in_codebooks_is_saved_as_data(normal):
    params, x = {"w": normal(16, 12)}, normal(5, 16)
    fn = lambda p, x: x @ p["w"]
    q_fn, q = quantize(fn, params, x, formats=Codebook(4, dim=2))
    assert isinstance(q["w"], VectorArray) and q["w"].format == "codebook4x2"
    _, shapes = rebuild(describe(q_fn, q), fn, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(q)


def test_what_does_not_fit_is_one_clear_line(normal):
    for options in ({"bits": 9}, {"bits": 0}, {"bits": 4, "stages": 0}):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            Codebook(**options)
    with pytest.raises(ValueError, match=r"w \(10, 6\).*choose a dim among \[1, 2, 5"):
        quantize(lambda p, x: x @ p["w"], {"w": normal(10, 6)}, normal(3, 10),
                 formats=Codebook(4, dim=4))  # fmt: skip
