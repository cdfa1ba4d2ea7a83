import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.precision import autocast
from jaxeff.precision.rules import ELEMENTWISE, KEEP, LINEAR, MULTIPLY, wanted
from jaxeff.program import equations

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def ran(fn, *args):
    """Each equation's primitive, with the dtypes of its operands."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [
        (e.primitive.name, [v.aval.dtype for v in e.invars])
        for _, e, _ in equations(jaxpr)
    ]


def operands(fn, name, *args):
    return {t for n, types in ran(fn, *args) if n == name for t in types}


def after_product(op):
    """`op` on the bfloat16 result of a product, and a product after it."""
    return lambda w, x: jnp.dot(op(x @ w), w)


W = 0.5 * jr.normal(jr.key(0), (4, 4))
X = jr.uniform(jr.key(1), (3, 4), minval=0.5)
SPD = lambda y: jnp.linalg.cholesky(y.T @ y + 3 * jnp.eye(4))
OPS = {
    "exp": (jnp.exp, F32),
    "log1p": (lambda y: jnp.log1p(jnp.square(y)), F32),
    "rsqrt": (lambda y: jax.lax.rsqrt(1 + y * y), F32),
    "pow": (lambda y: jnp.abs(y) ** 0.3, F32),
    "cumsum": (lambda y: jnp.cumsum(y, axis=1), F32),
    "reduce_prod": (lambda y: jnp.prod(y, axis=1)[:, None] * y, F32),
    "reduce_window_sum": (
        lambda y: jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 1), (1, 1), "SAME"),
        F32,
    ),
    "cholesky": (SPD, F32),
    "bitcast_convert_type": (
        lambda y: y + jax.lax.bitcast_convert_type(y, jnp.int32),
        F32,
    ),
    "tanh": (jnp.tanh, BF16),
    "logistic": (jax.nn.sigmoid, BF16),
    "max": (jax.nn.relu, BF16),
    "reduce_max": (lambda y: y - jnp.max(y), BF16),
    "sort": (lambda y: jnp.sort(y, axis=1), BF16),
    "concatenate": (lambda y: jnp.concatenate([y, y], axis=0), BF16),
    "scatter-add": (lambda y: y.at[jnp.array([0, 2, 0])].add(y), F32),
    "scatter": (lambda y: y.at[1].set(y[0]), BF16),
    "dynamic_update_slice": (
        lambda y: jax.lax.dynamic_update_slice(y, y[:1], (jnp.argmax(y) % 3, 0)),
        BF16,
    ),
    "pad": (lambda y: jnp.pad(y, ((1, 1), (0, 0))), BF16),
    "top_k": (lambda y: jax.lax.top_k(y, 4)[0], BF16),
}


@pytest.mark.parametrize("name", OPS)
def test_an_operation_runs_in_the_dtype_of_its_list(name):
    op, dtype = OPS[name]
    fn = after_product(op)
    found = operands(autocast(fn), name, W, X)
    assert dtype in found and found <= {dtype, jnp.dtype(jnp.int32)}
    y, true = jax.jit(autocast(fn))(W, X), fn(W, X)
    # What is cast to int32 bit by bit jumps; what is chosen is compared in tolerance.
    if name != "bitcast_convert_type":
        assert jnp.linalg.norm(y - true) < 0.02 * jnp.linalg.norm(true)
    assert y.dtype == true.dtype and bool(jnp.all(jnp.isfinite(y)))


@pytest.mark.parametrize(
    "name", ["scatter-add", "pad", "reduce_max", "rsqrt", "scatter"]
)
def test_its_gradient_does_too(name):
    fn = after_product(OPS[name][0])
    grad = lambda f: jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(f(w, X)))))(W)
    low, true = grad(autocast(fn)), grad(fn)
    assert jnp.linalg.norm(low - true) < 0.03 * jnp.linalg.norm(true)


def test_the_lists_agree():
    assert ELEMENTWISE <= KEEP and LINEAR <= KEEP and MULTIPLY <= KEEP
    assert not LINEAR & MULTIPLY


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fill", [jnp.finfo(jnp.float32).min, -1e9, -jnp.inf])
def test_a_row_without_a_single_score_is_as_uniform_as_in_float32(dtype, fill):
    """-3e38 is -inf in bfloat16, -1e9 in float16; a softmax of -inf is nan."""

    def fn(w, x):
        scores = jnp.where(jnp.zeros((3, 4), bool).at[0].set(True), x @ w, fill)
        top = jnp.maximum(scores, fill)  # a use that is not float32 by itself
        return jax.nn.softmax(top) @ w, jnp.isinf(scores)

    low, lost = autocast(fn, dtype)(W, X)
    true, missing = fn(W, X)
    assert jnp.array_equal(jnp.isnan(low), jnp.isnan(true))
    assert jnp.array_equal(lost, missing)


def test_one_over_a_small_number_is_finite_in_float16():
    fn = lambda w, x: 1e-4 * (1.0 / (1e-6 * jnp.abs(x @ w) + 1e-7))
    assert jnp.all(jnp.isfinite(autocast(fn, jnp.float16)(W, X)))


def test_a_product_with_an_explicit_precision_is_left_alone():
    highest = jax.lax.Precision.HIGHEST
    fn = lambda w, x: jnp.dot(x, w, precision=highest) @ w
    products = [t for n, t in ran(autocast(fn), W, X) if n == "dot_general"]
    assert products == [[F32, F32], [BF16, BF16]]
    with jax.default_matmul_precision("highest"):  # then nobody chose it
        products = [t for n, t in ran(autocast(fn), W, X) if n == "dot_general"]
    assert products == [[BF16, BF16], [BF16, BF16]]


def test_what_a_program_casts_itself_stays_cast():
    fn = lambda w, x: (x.astype(jnp.float16) @ w.astype(jnp.float16)) @ (w @ w)
    products = [t for n, t in ran(autocast(fn), W, X) if n == "dot_general"]
    assert [jnp.dtype(jnp.float16)] * 2 in products and [BF16, BF16] in products


def test_a_variance_is_exact_where_its_mean_is_large():
    """A variance of values rounded to bfloat16, but not of squares rounded to it."""

    def fn(w, x):
        y = x @ w
        mean = jnp.mean(y, axis=1, keepdims=True)
        return jnp.mean(jnp.square(y), axis=1) - mean[:, 0] ** 2

    # 200 and 202 are bfloat16 numbers, their squares are not.
    x = jnp.tile(jnp.array([[200.0, 202.0]]), (3, 8))
    assert jnp.all(autocast(fn)(jnp.eye(16), x) == 1.0)


def test_only_what_is_used_in_float32_alone_is_wanted_there():
    def fn(x, y):
        shifted = x - jnp.max(x)  # for the exp alone
        both = x + y  # for the exp and for a product
        return jnp.exp(shifted) + jnp.exp(both), both @ both.T

    jaxpr = jax.make_jaxpr(fn)(W, W)
    names = {
        e.primitive.name
        for e in jaxpr.jaxpr.eqns
        if wanted(jaxpr.jaxpr, (False, False)).intersection(e.outvars)
    }
    assert {"sub", "reduce_max"} <= names
    assert "add" not in names
    assert jaxpr.jaxpr.invars[1] not in wanted(jaxpr.jaxpr, (True, True))
