"""A program traced once, and what it prints."""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import lift, models, trace
from jaxeff.lowrank import factorize
from jaxeff.program import dense
from jaxeff.program.source import source_line
from jaxeff.quantization import int4, quantize
from tests.program.built import build, zoo
from tests.program.leaves import compress

X = jax.ShapeDtypeStruct((2, 5), jnp.float32)
PARAMS = {
    "layer": {
        "kernel": jax.ShapeDtypeStruct((5, 8), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    },
    "head": jax.ShapeDtypeStruct((8, 3), jnp.float32),
}


def fn(params, x):
    h = x @ params["layer"]["kernel"] + params["layer"]["bias"][None]
    return jax.nn.relu(h) @ params["head"]


def test_nothing_is_computed_or_allocated():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    program = trace(lambda w, x: x @ w, huge, jax.ShapeDtypeStruct((1, 10**6), "f4"))
    assert program.costs.flops == 2 * 10**12
    assert program.shapes[""].shape == (10**6, 10**6)


def test_weights_are_named_and_data_are_not():
    program = trace(fn, PARAMS, X)
    assert program.weights == ["head", "layer/bias", "layer/kernel", None]
    assert list(program.shapes) == ["head", "layer/bias", "layer/kernel"]


def test_arrays_and_their_shapes_give_the_same_program():
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), PARAMS)
    a, b = trace(fn, PARAMS, X), trace(fn, params, np.zeros((2, 5), np.float32))
    assert str(a.jaxpr) == str(b.jaxpr) and str(a) == str(b)


def test_each_view_is_computed_once():
    program = trace(fn, PARAMS, X)
    assert program.sites is program.sites
    assert program.couplings is program.couplings
    assert program.costs is program.costs


def test_what_is_no_array_is_a_constant():
    def fn(params, x, flag, *, times):
        return (x @ params["w"]) * times if flag else x

    params = {"w": PARAMS["head"], "name": "text"}
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    assert trace(fn, params, x, True, times=3).sites
    assert not trace(fn, params, x, False, times=3).sites


def test_a_function_of_leaves_is_traced_with_their_arrays_as_weights():
    model = build_mlp()
    leaves = compress(model[1])
    program = trace(lift(model[0]), leaves, *model[2])
    kernels = [p for p in program.shapes if p.endswith("kernel/values")]
    assert len(kernels) == 3
    assert {s.path for s in program.sites} == set(kernels)
    assert trace(model[0], dense(leaves), *model[2]).costs.matmul_flops == (
        program.costs.matmul_flops
    )


def build_mlp():
    model, x = models.MLP((6, 4), 3), jnp.ones((2, 5))
    return model.apply, model.init(jr.key(0), x), (x,)


def test_the_table_tells_shapes_couplings_and_costs():
    lines = str(trace(fn, PARAMS, X)).splitlines()
    head, _, *rows, total, note = lines
    assert head.split()[:2] == ["weight", "dims:"]
    table = {row.split()[0]: row for row in rows}
    assert list(table) == ["head", "layer/bias", "layer/kernel"]
    # The hidden dim has one name in all three; what is frozen bears a star.
    (name,) = re.findall(r"8 (c\d)\b(?!\*)", table["layer/bias"])
    assert f"8 {name}" in table["head"] and f"8 {name}" in table["layer/kernel"]
    assert re.search(r"3 c\d\*", table["head"]), table["head"]
    assert "bfloat16" in table["layer/kernel"] and "160" in table["layer/kernel"]
    assert total.split()[:2] == ["total", "72"]
    assert note.startswith("2 sites; 3 couplings, 1 free")
    assert len({len(line.rstrip()) <= 120 for line in lines}) == 1


@zoo
def test_every_model_of_the_zoo_prints_a_row_for_each_weight(case):
    program = build(case).program
    lines = str(program).splitlines()
    assert len(lines) == len(program.shapes) + 4
    for path, line in zip(program.shapes, lines[2:], strict=False):
        assert line.startswith(path)


def test_two_weights_of_one_name_are_an_error():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="2 weights are called a/b"):
        trace(lambda p, x: x, params, X)


def test_a_line_is_the_users_also_inside_library_functions():
    def model(x):
        x = jax.nn.softmax(x)
        return jnp.take(x, jnp.array([0]), axis=1)

    start = model.__code__.co_firstlineno
    jaxpr = jax.make_jaxpr(model)(X)
    lines = {source_line(eqn) for eqn in jaxpr.jaxpr.eqns}
    assert lines == {f"test_trace.py:{start + n} (model)" for n in (1, 2)}


def test_a_typed_key_among_the_weights_can_be_printed():
    params = {"w": jnp.ones((20, 3)), "k": jax.random.key(0)}
    program = trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 20)))
    assert "key<fry>" in str(program)


@pytest.mark.parametrize("factor", [False, True])
def test_packed_weights_count_as_numbers_and_have_their_flops(factor):
    def fn(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(x, (1, 2)) @ p["dense"]

    params, x = {"conv": jnp.ones((3, 3, 4, 16)), "dense": jnp.ones((16, 9))}, None
    x, dense = jnp.ones((2, 5, 5, 4)), params
    if factor:
        fn, params = factorize(fn, params, x, ranks={"conv": 3, "dense": 2})
    before = trace(fn, params, x)
    formats = {"{conv,dense}": int4} if not factor else {"**": int4}
    program = trace(*quantize(fn, params, x, formats=formats), x)
    rows = {line.split()[0]: line.split() for line in str(program).splitlines()}
    for path in before.shapes:
        stored = f"{path}/values"
        assert rows[stored][-3] == f"{before.shapes[path].size:,}"
        assert program.costs.weights[stored].flops == before.costs.weights[path].flops
    assert dense["conv"].ndim == 4
