import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quantization import int4, int8, quantize, report, w8a8
from tests.zoo import ZOO


def fn(params, x):
    y = jax.nn.relu(x @ params["up"] + params["bias"][None])
    return y @ params["down"]


def make(normal):
    shapes = {"up": (8, 12), "bias": (12,), "down": (12, 8)}
    return {k: normal(*s) for k, s in shapes.items()}, normal(5, 8)


def test_a_typed_key_among_the_weights_has_a_row():
    params = {"w": jnp.ones((20, 3)), "k": jax.random.key(0)}
    rows = report(lambda p, x: x @ p["w"], params, jnp.ones((2, 20))).rows
    assert {r.path: r.format for r in rows} == {"k": "key<fry>", "w": "int8"}


def test_bits_and_errors_are_those_of_what_is_stored(normal):
    params, x = make(normal)
    formats = {"up": int4.grouped(4), "down": int8}
    r = report(fn, params, x, formats=formats)
    rows = {row.path: row for row in r.rows}
    _, q = quantize(fn, params, x, formats=formats)
    assert rows["up"].bits == 4 + 32 / 4
    assert rows["down"].bits == 8 + 32 / 12
    assert rows["bias"].bits == 32
    total = sum(x.nbytes for x in jax.tree.leaves(q))
    assert r.bits * sum(x.size for x in params.values()) == pytest.approx(8 * total)
    for path in ("up", "down"):
        w = np.asarray(params[path])
        error = np.linalg.norm(q[path].dense() - w) / np.linalg.norm(w)
        assert rows[path].error == pytest.approx(error, rel=1e-5)
    assert rows["bias"].error is None and rows["bias"].stays
    assert rows["bias"].note == "no product, convolution or look-up uses it"


def test_the_table_lists_what_changes_and_why_the_rest_stays(normal):
    params, x = make(normal)
    text = str(report(fn, params, x, formats={"up": w8a8}))
    assert "w8a8" in text and "all weights" in text
    assert "stays as it is: no pattern matches it (1: down)" in text
    assert (
        "stays as it is: no product, convolution or look-up uses it (1: bias)" in text
    )


def test_what_runs_dense_after_all_is_told(normal):
    params, x = {"w": normal(8, 8)}, normal(5, 8)
    both = lambda p, x: x @ p["w"] + p["w"].sum()
    (row,) = report(both, params, x).rows
    assert not row.stays and row.note.startswith("reduce_sum at test_report.py:")


def test_shapes_alone_give_bits_without_errors(getkey):
    fn, params, args = next(c for c in ZOO if c.name == "nnx_cnn").build(getkey())
    shapes = jax.eval_shape(lambda p: p, params)
    rows = report(fn, shapes, *args).rows
    expected = report(fn, params, *args).rows
    assert [r.bits for r in rows] == [r.bits for r in expected]
    assert all(r.error is None for r in rows)
    assert sum(r.error is not None for r in expected) == 3
