import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization import blocks

RNG = np.random.default_rng(0)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def draw_scale():
    """A shape, and a scale whose lengths divide it."""
    shape = [int(n) for n in RNG.choice([1, 2, 3, 4, 6, 8], RNG.integers(1, 5))]
    lengths = [int(RNG.choice(divisors(n))) for n in shape]
    scale = np.arange(1, 1 + np.prod(lengths), dtype=np.float32).reshape(lengths)
    return tuple(shape), scale


def draw_reshape(shape):
    """Another shape of as many elements."""
    left, new = int(np.prod(shape)), []
    while left > 1 or not new:
        new.append(int(RNG.choice(divisors(left))))
        left //= new[-1]
    return tuple(new)


def draw_mask(n):
    mask = RNG.random(n) < 0.6
    mask[RNG.integers(n)] = True
    return mask


CASES = [draw_scale() for _ in range(25)]


def run(fn, *args):
    # One compilation for all cases: eager JAX would compile for every shape.
    return jax.jit(fn)(*args)


def test_reshaping_the_scale_is_reshaping_what_it_expands_to():
    news = [draw_reshape(shape) for shape, _ in CASES]

    def pairs(scales):
        for (shape, _), new, scale in zip(CASES, news, scales, strict=True):
            reshaped = blocks.reshape(scale, shape, new)
            assert all(n % m == 0 for n, m in zip(new, reshaped.shape, strict=True))
            expected = blocks.expand(scale, shape).reshape(new)
            yield blocks.expand(reshaped, new), expected

    for ours, expected in run(lambda s: list(pairs(s)), [s for _, s in CASES]):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "old, lengths, new, expected",
    [
        ((6, 4, 5), (1, 1, 5), (24, 5), (1, 5)),  # one scale stays one
        ((6, 4, 5), (6, 4, 1), (24, 5), (24, 1)),
        ((64, 5), (4, 5), (8, 8, 5), (4, 1, 5)),  # groups of 16 are two rows of 8
        ((64, 5), (4, 5), (2, 32, 5), (2, 2, 5)),
        ((8, 8, 5), (4, 1, 5), (64, 5), (4, 5)),
        ((4, 6), (2, 1), (3, 8), (3, 4)),  # runs of 12: only runs of 2 fit both
        ((4, 6), (1, 1), (6, 4), (1, 1)),
        ((5,), (5,), (1, 5, 1), (1, 5, 1)),
    ],
)
def test_a_reshaped_scale_stays_as_small_as_blocks_can_be(old, lengths, new, expected):
    scale = jax.ShapeDtypeStruct(lengths, jnp.float32)
    reshaped = jax.eval_shape(lambda s: blocks.reshape(s, old, new), scale)
    assert reshaped.shape == expected


def test_keeping_indices_of_the_scale_is_keeping_what_it_expands_to():
    dims = [int(RNG.integers(len(shape))) for shape, _ in CASES]
    masks = [draw_mask(shape[d]) for (shape, _), d in zip(CASES, dims, strict=True)]

    def pairs(scales):
        for (shape, _), d, mask, scale in zip(CASES, dims, masks, scales, strict=True):
            kept = [int(mask.sum()) if i == d else n for i, n in enumerate(shape)]
            ours = blocks.expand(blocks.keep(scale, d, mask), kept)
            yield ours, blocks.expand(scale, shape)

    results = run(lambda s: list(pairs(s)), [s for _, s in CASES])
    for (ours, whole), d, mask in zip(results, dims, masks, strict=True):
        np.testing.assert_array_equal(
            ours, np.compress(mask, np.asarray(whole), axis=d)
        )


def test_blocks_that_lose_as_many_indices_stay_blocks():
    mask = np.array([1, 1, 0, 0] * 3 + [0, 0, 0, 0], bool)
    scale = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(
        blocks.keep(scale, 0, mask), jnp.array([0.0, 1, 2])[:, None]
    )


def test_what_is_said_of_each_block_is_said_of_its_neighbours():
    xs = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape, _ in CASES]

    def found(xs):
        for (shape, like), x in zip(CASES, xs, strict=True):
            sizes = [n // m for n, m in zip(shape, like.shape, strict=True)]
            low, high = blocks.ends(x, sizes)
            yield low, high, blocks.absmax(x, sizes), blocks.total(x, sizes)

    results = run(lambda xs: list(found(xs)), xs)
    for (_, like), x, made in zip(CASES, xs, results, strict=True):
        expected = np.zeros((4, *like.shape), np.float32)
        for at in np.ndindex(like.shape):
            cut = tuple(
                slice(i * n // m, (i + 1) * n // m)
                for i, n, m in zip(at, x.shape, like.shape, strict=True)
            )
            part = np.asarray(x)[cut]
            of = min(part.min(), 0), max(part.max(), 0), abs(part).max(), part.sum()
            expected[(slice(None), *at)] = of
        np.testing.assert_allclose(np.stack(made), expected, rtol=1e-5, atol=1e-5)
