import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import tree
from jaxeff.program import Chain, trace


def layer(w, x, mask):
    h = jax.nn.gelu(x @ w["up"].astype(x.dtype))
    return x + jnp.where(mask, h @ w["down"].astype(x.dtype), 0)


def stacked(params, x, lengths):
    mask = (jnp.arange(x.shape[0]) < lengths)[:, None]
    x = x @ params["in"]
    x, sums = jax.lax.scan(
        lambda x, w: (y := layer(w, x, mask), y.sum()), x, params["layers"]
    )
    return x @ params["in"].T, sums


def problem():
    keys = jr.split(jr.key(0), 4)
    params = {
        "in": jr.normal(keys[0], (8, 8)),
        "layers": {
            "up": jr.normal(keys[1], (5, 8, 16)),
            "down": jr.normal(keys[2], (5, 16, 8)),
        },
        "unused": jnp.ones(3),
    }
    return params, (jr.normal(keys[3], (4, 8)), jnp.int32(3))


def run(pieces, shared, params, data):
    """The pieces one after another, each with nothing but what it says it needs."""
    weights, taken, outs = tree.paths(params), [], {}
    for piece in pieces:
        of = lambda part: weights[part.path]
        own = {
            part: of(part) if part.turn is None else of(part)[part.turn]
            for part in piece.weights
        }
        assert [(x.shape, x.dtype) for x in taken] == [
            (s.shape, s.dtype) for s in piece.takes
        ]
        taken, made = piece(own, {p: weights[p] for p in shared}, data, taken)
        outs.update(zip(piece.makes, made, strict=True))
    assert not taken
    return outs


@pytest.mark.parametrize("every", [1, 2, 7])
def test_pieces_one_after_another_are_the_function(every):
    params, data = problem()
    chain = Chain(stacked, params, data, {})
    places = [c.at for c in chain.crossings[:-1]][::every]
    pieces, shared = chain.cut(places)
    got = chain.result(run(pieces, shared, params, data))
    for a, b in zip(got, stacked(params, *data), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_what_is_said_to_cross_is_what_is_handed_on():
    params, data = problem()
    chain = Chain(stacked, params, data, {})
    *inner, end = chain.crossings
    assert (end.arrays, end.bytes, end.at) == (0, 0, chain.steps)
    for c in inner:
        (piece, _), _ = chain.cut([c.at])
        sizes = [s.size * s.dtype.itemsize for s in piece.gives]
        assert (c.arrays, c.bytes) == (len(sizes), sum(sizes))


def test_between_layers_one_array_crosses_and_no_mask_does():
    params, data = problem()
    chain = Chain(stacked, params, data, {})
    ones = [c for c in chain.crossings if c.arrays == 1]
    assert len(ones) >= 5 and {c.bytes for c in ones} == {4 * 8 * 4}


def test_flops_are_those_of_the_program_but_for_what_is_made_again():
    params, data = problem()
    chain = Chain(stacked, params, data, {})
    every = trace(stacked, params, *data).costs.flops
    counted = sum(c.flops for c in chain.crossings)
    assert 0.98 * every < counted <= every


def test_each_layer_goes_to_one_piece_and_what_two_use_to_none():
    params, data = problem()
    chain = Chain(stacked, params, data, {})
    middle = [c.at for c in chain.crossings if c.arrays == 1][2]
    (first, second), shared = chain.cut([middle])
    assert shared == ["in", "unused"]
    turns = [{p.turn for p in piece.weights} for piece in (first, second)]
    assert turns[0] | turns[1] == {*range(5)} and not turns[0] & turns[1]
