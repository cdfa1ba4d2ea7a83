import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.program import halves


def layer(w, x, key):
    h = jax.nn.gelu(x @ w["up"].astype(x.dtype))
    h = jnp.where(jr.bernoulli(jr.wrap_key_data(key), 0.9, h.shape), h, 0)
    return x + h @ w["down"].astype(x.dtype)


def loop(weights, x, key):
    for i in range(2):
        x = layer(jax.tree.map(lambda a, i=i: a[i], weights), x, key)
    return x


def scan(weights, x, key):
    return jax.lax.scan(lambda x, w: (layer(w, x, key), None), x, weights)[0]


def problem(dtype=jnp.float32):
    keys = jr.split(jr.key(0), 4)
    weights = {
        "up": jr.normal(keys[0], (2, 8, 16)),
        "down": jr.normal(keys[1], (2, 16, 8)),
    }
    return weights, jr.normal(keys[2], (4, 8), dtype), jr.key_data(keys[3])


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize(
    "fn", [loop, scan, jax.checkpoint(loop)], ids=["loop", "scan", "remat"]
)
def test_apart_they_give_what_they_give_together(fn):
    weights, x, key = problem()
    half = halves(fn, weights, x, key)
    y, back = jax.vjp(lambda w, x: fn(w, x, key), weights, x)
    g = jnp.cos(y)
    of_weights, of_x = back(g)
    got, kept = half.forward(weights, x, key)
    same(got, y)
    same(half.backward(weights, kept, g), (of_weights, of_x))
    first, handed = half.of_input(weights, kept, g)
    same(first, of_x)
    same(half.of_weights(weights, kept, handed), of_weights)
    assert [(a.shape, a.dtype) for a in kept] == [(s.shape, s.dtype) for s in half.kept]
    shapes = [(s.shape, s.dtype) for s in half.handed]
    assert [(a.shape, a.dtype) for a in handed] == shapes


@pytest.mark.parametrize(
    "fn, dtype",
    [(loop, jnp.float32), (loop, jnp.bfloat16), (scan, jnp.float32)],
    ids=["loop", "loop that casts", "scan"],
)
def test_neither_weights_nor_their_casts_are_kept(fn, dtype):
    weights, x, key = problem(dtype)
    shapes = {s.shape[-2:] for s in halves(fn, weights, x, key).kept}
    assert not shapes & {(8, 16), (16, 8)} and x.shape in shapes


def test_what_is_computed_again_keeps_only_its_inputs():
    weights, x, key = problem()
    kept = halves(jax.checkpoint(loop), weights, x, key).kept
    assert [s.shape for s in kept] == [x.shape, key.shape]


def test_a_jitted_layer_is_cut_as_any():
    inner = jax.jit(layer)

    def fn(weights, x, key):
        return inner(jax.tree.map(lambda a: a[0], weights), x, key)

    weights, x, key = problem()
    half = halves(fn, weights, x, key)
    count = lambda eqns: sum(e.primitive.name == "dot_general" for e in eqns)
    assert (count(half._of_input), count(half._of_weights)) == (2, 2)


def test_the_first_half_of_a_backward_leaves_the_products_of_the_second_out():
    weights, x, key = problem()
    half = halves(loop, weights, x, key)
    _, kept = half.forward(weights, x, key)

    def products(run, *args):
        return str(jax.make_jaxpr(run)(*args)).count("dot_general")

    g = jnp.ones_like(x)
    _, handed = half.of_input(weights, kept, g)
    forward = 4  # of the trace again, for what hangs on weights alone; compiled away
    assert products(half.of_input, weights, kept, g) == 4 + forward
    assert products(half.of_weights, weights, kept, handed) == 4 + forward
    assert products(half.backward, weights, kept, g) == 8 + forward
