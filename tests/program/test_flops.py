"""FLOPs counted on the trace are those XLA counts on the program it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from jax import lax

from jaxeff.program import bodies, equations
from jaxeff.program.costs import count
from tests.program.built import build, zoo

X = jax.ShapeDtypeStruct((6, 8), jnp.float32)
I = jax.ShapeDtypeStruct((6, 8), jnp.int32)
B = jax.ShapeDtypeStruct((6, 8), jnp.bool_)


def ours(fn, *args):
    costs = count(jax.make_jaxpr(fn)(*args))
    return costs.flops, costs.transcendentals


def xla(fn, *args):
    """Before optimisation: what was asked for, not what the compiler made of it."""
    costs = jax.jit(fn).lower(*args).cost_analysis()
    return costs.get("flops", 0), costs.get("transcendentals", 0)


def agree(fn, *args):
    return ours(fn, *args) == xla(fn, *args)


UNARY = (
    "neg sin cos tan tanh atan exp exp2 expm1 log log1p logistic sqrt rsqrt cbrt "
    "square abs sign floor ceil round is_finite erf"
).split()
BINARY = "add sub mul div rem max min pow atan2 eq ne lt le gt ge".split()
INTEGER = (
    "bitwise_and bitwise_or bitwise_xor shift_left shift_right_logical add mul div"
).split()


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_number(name):
    assert agree(getattr(lax, name), X)


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_numbers(name):
    assert agree(getattr(lax, name), X, X)


@pytest.mark.parametrize("name", INTEGER)
def test_functions_of_integers(name):
    assert agree(getattr(lax, name), I, I)


@pytest.mark.parametrize("n", [-3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 15])
def test_integer_powers_are_repeated_squaring(n):
    assert agree(lambda x: lax.integer_pow(x, n), X)


OTHERS = {
    "select": (lambda b, x: lax.select(b, x, -x), B, X),
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), X),
    "cast": (lambda x: x.astype(jnp.bfloat16), X),
    "cast of flags": (lambda x: x.astype(jnp.float32), B),
    "cast to the same type": (lambda x: lax.convert_element_type(x, jnp.float32), X),
    "bits": (lambda x: lax.bitcast_convert_type(x, jnp.int32), X),
    "reduced precision": (lambda x: lax.reduce_precision(x, 5, 10), X),
    "sum": (lambda x: x.sum(1), X),
    "sum in half precision": (lambda x: x.astype(jnp.bfloat16).sum(0), X),
    "mean": (lambda x: x.mean(), X),
    "max": (lambda x: x.max(0), X),
    "any": (lambda x: x.any(), B),
    "argmax": (lambda x: jnp.argmax(x, 0), X),
    "argmin of integers": (lambda x: jnp.argmin(x, 1), I),
    "sort": (lambda x: lax.sort(x), X),
    "sort of pairs": (lambda x, i: lax.sort((x, i), num_keys=1), X, I),
    "softmax": (jax.nn.softmax, X),
    "gelu": (jax.nn.gelu, X),
    "silu": (jax.nn.silu, X),
    "moved": (lambda x: jnp.concatenate([x[::-1], jnp.pad(x, 1)[1:-1, 1:-1]]).T, X),
    "positions": (lambda x: x + jnp.arange(8.0)[None], X),
    "rows": (lambda x, i: x[i[0]], X, I),
    "rows, clipped": (lambda x, i: x.at[i[0], i[1]].get(mode="clip"), X, I),
    "along an axis": (lambda x, i: jnp.take_along_axis(x, i, 1), X, I),
    "scattered": (lambda x: x.at[2].set(1.0), X),
    "scattered and added": (lambda x: x.at[2].add(1.0).at[:, 1].max(0.0), X),
    "max pool": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (3, 3), (1, 1), "SAME"),
        X,
    ),
    "sum pool": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID"),
        X,
    ),
    "matmul": (lambda x: x @ x.T, X),
    "batched matmul": (
        lambda x: jnp.einsum("bij,bkj->bik", x.reshape(2, 3, 8), x.reshape(2, 3, 8)),
        X,
    ),
    "integer matmul": (
        lambda i: lax.dot(i, i.T, preferred_element_type=jnp.int32),
        jax.ShapeDtypeStruct((6, 8), jnp.int8),
    ),
    "dot of scalars": (lambda x: jnp.vdot(x[0], x[1]), X),
    "unused": (
        lambda x: (jnp.exp(x), jax.jit(lambda x: (x * 2, jnp.cos(x)))(x)[0])[1],
        X,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations(name):
    fn, *args = OTHERS[name]
    assert agree(fn, *args)


@st.composite
def convolutions(draw):
    n = draw(st.integers(1, 2))
    groups, batch_groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    small, each = st.integers(1, 3), lambda s: st.tuples(*[s] * n)
    x = (
        batch_groups * draw(small),
        groups * draw(small),
        *draw(each(st.integers(1, 8))),
    )
    w = (groups * batch_groups * draw(small), x[1] // groups, *draw(each(small)))
    options = dict(
        window_strides=draw(each(small)),
        padding=draw(each(st.tuples(st.integers(-1, 4), st.integers(-1, 4)))),
        lhs_dilation=draw(each(small)),
        rhs_dilation=draw(each(small)),
        feature_group_count=groups,
        batch_group_count=batch_groups,
    )
    return x, w, options


@given(convolutions())
def test_convolutions_of_every_kind(case):
    *shapes, options = case
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    fn = lambda x, w: lax.conv_general_dilated(x, w, **options)
    try:
        assume(jax.eval_shape(fn, x, w).size > 0)
    except (TypeError, ValueError):  # the window does not fit
        assume(False)
    assert agree(fn, x, w)


@settings(max_examples=10)
@given(st.sampled_from(["SAME", "VALID"]), st.integers(1, 3), st.integers(1, 4))
def test_transposed_convolutions(padding, stride, window):
    x = jax.ShapeDtypeStruct((2, 5, 6, 3), jnp.float32)
    w = jax.ShapeDtypeStruct((window, window, 3, 4), jnp.float32)
    assert agree(lambda x, w: lax.conv_transpose(x, w, (stride, stride), padding), x, w)


def test_ragged_products_count_each_row_once():
    x, w = jnp.ones((6, 8)), jnp.ones((2, 8, 5))
    costs = count(jax.make_jaxpr(lax.ragged_dot)(x, w, jnp.array([2, 4])))
    assert costs.flops == costs.matmul_flops == 2 * 6 * 8 * 5


def test_cumulative_sums_count_one_addition_per_step():
    assert ours(lambda x: lax.cumsum(x, axis=1), X) == (6 * 7, 0)


def loop_free(case):
    jaxpr = build(case).program.jaxpr
    names = {eqn.primitive.name for _, eqn, _ in equations(jaxpr)}
    return not names & {"scan", "while", "cond"}


# What XLA folds while it reads the program, in elements: the subtraction of the
# zero mean that Flax gives RMS norms, and scalars made of constants alone.
FOLDED = {
    "linen_llama": (5 * 2 * 6 * 16, 0),
    "linen_llama_half_tied_remat": (5 * 2 * 6 * 16, 0),
    "nnx_transformer": (2 * 5 * 8, 0),
    "linen_transformer": (0, 2),
    "equinox_transformer": (3, 0),
}


@zoo
def test_models_without_loops_cost_what_the_compiler_counts(case):
    model = build(case)
    if not loop_free(case):
        pytest.skip("it has loops or branches, of which XLA counts one turn")
    costs = model.program.costs
    flops, transcendentals = FOLDED.get(case.name, (0, 0))
    counted = xla(model.fn, model.params, *model.args)
    assert counted == (costs.flops - flops, costs.transcendentals - transcendentals)
    assert 0.5 * costs.flops < costs.matmul_flops < costs.flops


def test_bodies_are_counted_once_and_calls_not_at_all():
    fn = lambda x: jax.jit(jnp.sin)(jax.checkpoint(jnp.cos)(x))
    assert ours(fn, X) == (0, 2 * 48)
    eqn = jax.make_jaxpr(jax.jit(jnp.sin))(X).jaxpr.eqns[0]
    assert len(bodies(eqn)) == 1 and np.prod(eqn.outvars[0].aval.shape) == 48
