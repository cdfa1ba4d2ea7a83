import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.extend.core import Var

from jaxeff import models
from jaxeff.precision import autocast
from jaxeff.precision.rules import EACH, KEEP, PRODUCTS, VIEWS
from jaxeff.program import bodies, equations, Leaf, lift
from jaxeff.program.walk import scan_counts
from jaxeff.quantization import quantize, w8a8
from jaxeff.tree import pytree
from tests.zoo import ZOO

BF16 = jnp.dtype(jnp.bfloat16)
LOOPS = [c for c in ZOO if c.name.endswith(("_scan", "_scan_remat", "_lstm", "_flow"))]
LOOPS += [c for c in ZOO if c.name == "plain_transformer"]
# One of each kind: enough for what has to be compiled twice with its gradient.
SOME = [
    c
    for c in ZOO
    if c.name
    in (
        "linen_resnet equinox_cnn  plain_control_flow plain_custom_vjp plain_lstm"
    ).split()
]
every = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


@functools.cache
def built(case):
    return case.build(jr.key(0))


@functools.cache
def low_jaxpr(case):
    fn, params, args = built(case)
    return traced(autocast(fn), params, args)


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def distance(a, b):
    """Of two trees, relative to the second."""
    return jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b))


def dtypes(variables):
    return [v.aval.dtype for v in variables if hasattr(v.aval, "dtype")]


def traced(fn, params, args):
    return jax.make_jaxpr(fn)(params, *args)


@every(ZOO)
def test_products_run_in_bfloat16_and_sums_and_exponentials_in_float32(case):
    fn, params, args = built(case)
    jaxpr = low_jaxpr(case)
    polymorphic = KEEP | EACH | PRODUCTS | {"convert_element_type"}
    products = 0
    for where, eqn, _ in equations(jaxpr):
        name = eqn.primitive.name
        if name in PRODUCTS:
            products += 1
            assert set(dtypes(eqn.invars)) == {BF16}
            assert dtypes(eqn.outvars) == [BF16]
        elif name not in polymorphic and not bodies(eqn, where):
            assert BF16 not in dtypes(eqn.invars), name
    dense = traced(fn, params, args)
    assert products == sum(e.primitive.name in PRODUCTS for _, e, _ in equations(dense))
    assert dtypes(jaxpr.jaxpr.outvars) == dtypes(dense.jaxpr.outvars)


@every(ZOO)
def test_where_nothing_is_cast_it_equals_the_function_bit_for_bit(case):
    fn, params, args = built(case)
    # In one program, or two programs could be fused, and so rounded, differently.
    both = jax.jit(lambda *xs: (autocast(fn, jnp.float32)(*xs), fn(*xs)))
    same, y = both(params, *args)
    assert same.dtype == y.dtype and jnp.array_equal(same, y)


@every(SOME)
def test_outputs_and_gradients_are_near_those_of_float32(case):
    fn, params, args = built(case)
    weights = jr.normal(jr.key(1), jax.eval_shape(fn, params, *args).shape)

    def value_and_grad(f):
        loss = lambda p: (jnp.sum(weights * f(p, *args)), f(p, *args))
        differentiable = case.name != "plain_control_flow"  # a while is not
        grads, out = (jax.grad(loss, has_aux=True) if differentiable else loss)(params)
        return grads, out

    grads, out = jax.jit(lambda: value_and_grad(fn))()
    low_grads, low_out = jax.jit(lambda: value_and_grad(autocast(fn)))()
    types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert types(low_grads) == types(grads)
    assert distance(low_out, out) < 0.015
    assert distance(low_grads, grads) < 0.03
    assert not jnp.array_equal(low_out, out)


def saved_bytes(fn, params, args):
    """What `grad` keeps for the backward pass, without the weights themselves."""
    jaxpr = jax.make_jaxpr(lambda p, *a: jax.vjp(lambda p: fn(p, *a), p))(params, *args)
    ins = {id(v) for v in jaxpr.jaxpr.invars[: len(jax.tree.leaves(params))]}
    kept = {id(v): v.aval for v in jaxpr.jaxpr.outvars if isinstance(v, Var)}
    return sum(a.size * a.dtype.itemsize for i, a in kept.items() if i not in ins)


@every([c for c in ZOO if "remat" not in c.name and c.name != "plain_transformer"])
def test_grad_saves_fewer_bytes(case):
    fn, params, args = built(case)
    # A batch so large that the copies of the weights do not count.
    args = [jnp.tile(x, (64, *[1] * (x.ndim - 1))) for x in args]
    ratio = saved_bytes(autocast(fn), params, args) / saved_bytes(fn, params, args)
    # What is left: masks, and residual streams and cell states, which stay float32.
    assert ratio < 0.73


def test_grad_of_batch_norm_in_training_saves_half_the_bytes():
    model = models.ResNet(depth=8, width=8, classes=5)
    x = jnp.ones((16, 16, 16, 3))
    variables = jax.eval_shape(model.init, jr.key(0), x)

    def loss(variables, x):
        out, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy(out, jnp.ones_like(out)).mean(), new

    first = lambda f: lambda p, x: f(p, x)[0]
    low = saved_bytes(first(autocast(loss)), variables, [x])
    assert low < 0.57 * saved_bytes(first(loss), variables, [x])
    shapes = jax.eval_shape(loss, variables, x)
    assert jax.eval_shape(autocast(loss), variables, x) == shapes


def cast_inside(jaxpr):
    """Operands of loops, carries apart, that a turn of the loop casts."""
    found = []
    for where, eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "scan":
            consts, carry = scan_counts(eqn)
            carried = range(consts, consts + carry)
        elif eqn.primitive.name == "while":
            carried = range(len(eqn.invars) - len(eqn.outvars), len(eqn.invars))
        else:
            continue
        for body in bodies(eqn, where):
            enters = zip(body.jaxpr.jaxpr.invars, body.operands, strict=True)
            fixed = {v for v, i in enters if i not in carried}
            found += _casts(body.jaxpr, fixed)
    return found


def _casts(jaxpr, fixed):
    for eqn in jaxpr.jaxpr.eqns:
        ours = [isinstance(v, Var) and v in fixed for v in eqn.invars]
        if eqn.primitive.name in VIEWS and ours[0]:
            fixed |= set(eqn.outvars)
        elif eqn.primitive.name == "convert_element_type" and ours[0]:
            if dtypes(eqn.outvars) == [BF16]:
                yield eqn
        for body in bodies(eqn):
            enters = zip(body.jaxpr.jaxpr.invars, body.operands, strict=True)
            yield from _casts(body.jaxpr, {v for v, i in enters if ours[i]})


@every(LOOPS)
def test_a_weight_used_in_a_loop_is_cast_once_outside_it(case):
    assert cast_inside(low_jaxpr(case)) == []


def test_a_weight_used_twice_is_cast_once(getkey):
    w, x = jr.normal(getkey(), (4, 4)), jr.normal(getkey(), (3, 4))
    jaxpr = traced(autocast(lambda w, x: jnp.tanh(x @ w) @ w), w, [x])
    casts = [e for e in jaxpr.jaxpr.eqns if e.invars[0] is jaxpr.jaxpr.invars[0]]
    assert [e.primitive.name for e in casts] == ["convert_element_type"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_jit_vmap_and_both_orders_of_grad_and_jit_agree(dtype, getkey):
    def fn(params, x):
        return jnp.tanh(x @ params["w"] + params["bias"][None]) @ params["w"]

    params = {"w": jr.normal(getkey(), (4, 4)), "bias": jr.normal(getkey(), (4,))}
    x = jr.normal(getkey(), (3, 4))
    low = autocast(fn, dtype)
    y = low(params, x)
    # Fusion may skip a rounding, so a compiled function is only near.
    assert distance(jax.jit(low)(params, x), y) < 1e-2
    one_by_one = jax.vmap(low, in_axes=(None, 0))(params, x[:, None])[:, 0]
    assert distance(one_by_one, y) < 1e-2
    loss = lambda f: lambda p: jnp.sum(jnp.square(f(p, x)))
    inside = jax.jit(jax.grad(loss(low)))(params)
    outside = jax.grad(loss(jax.jit(low)))(params)
    true = jax.grad(loss(fn))(params)
    assert distance(inside, outside) < 2e-2
    assert distance(inside, true) < 3e-2
    # Forward over the same program: the directional derivative agrees.
    _, slope = jax.jvp(loss(low), (params,), (true,))
    assert jnp.allclose(slope, jnp.sum(jnp.square(flat(true))), rtol=3e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_may_stay_in_low_precision(dtype, getkey):
    fn = lambda w, x: {"y": x @ w, "n": jnp.argmax(x), "s": jnp.sum(x)}
    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (2, 4))
    out = autocast(fn, dtype, outputs=dtype)(w, x)
    assert out["y"].dtype == out["s"].dtype == jnp.dtype(dtype)
    assert out["n"].dtype == jnp.int32
    out = autocast(fn, dtype)(w, x)
    assert out["y"].dtype == out["s"].dtype == jnp.float32


@pytree
class Doubled(Leaf):
    """Stands for twice its array."""

    half: jax.Array

    @property
    def shape(self):
        return self.half.shape

    @property
    def dtype(self):
        return self.half.dtype

    def dense(self):
        return self.half * 2

    def dot(self, x, dot):
        return dot(x, self.half) * 2


def test_compressed_weights_multiply_in_low_precision(getkey):
    def fn(params, x):
        return jax.nn.relu(x @ params["w"] + params["bias"][None]) @ params["v"]

    shapes = {"w": (5, 8), "bias": (8,), "v": (8, 3)}
    params = {k: jr.normal(getkey(), s) for k, s in shapes.items()}
    x = jr.normal(getkey(), (4, 5))
    leaves = {**params, "w": Doubled(params["w"] / 2), "v": Doubled(params["v"] / 2)}
    low = autocast(lift(fn))
    assert distance(low(leaves, x), fn(params, x)) < 1e-2
    for _, eqn, _ in equations(traced(low, leaves, [x])):
        if eqn.primitive.name == "dot_general":
            assert set(dtypes(eqn.invars)) == {BF16}


def test_integers_booleans_and_keys_are_left_alone(getkey):
    def fn(w, x, key, table, flag):
        key, sub = jr.split(key)
        keep = jr.bernoulli(sub, 0.5, x.shape)
        picked = table[jnp.argmax(x, axis=-1)]
        y = jnp.where(flag, jnp.where(keep, x, 0.0), x) @ w
        return y, key, keep, picked, table + 300

    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (2, 4))
    args = (w, x, jr.key(1), jnp.arange(4) * 1001, jnp.array(True))
    y, *rest = autocast(fn)(*args)
    true, *expected = fn(*args)
    assert distance(y, true) < 1e-2
    for a, b in zip(rest, expected, strict=True):
        assert a.dtype == b.dtype
        assert (
            jnp.array_equal(jr.key_data(a), jr.key_data(b))
            if a is rest[0]
            else (jnp.array_equal(a, b))
        )


def test_autocast_of_autocast_keeps_the_inner_choice(getkey):
    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (2, 4))
    inner = autocast(lambda w, x: x @ w, jnp.bfloat16)
    outer = autocast(inner, jnp.bfloat16)
    assert jnp.array_equal(outer(w, x), inner(w, x))
    with pytest.raises(ValueError, match=r"nothing runs in float16.*1 in bfloat16"):
        autocast(inner, jnp.float16)(w, x)


def test_a_function_whose_products_are_all_integers_is_run_as_it_is(normal):
    params, x = {"w": normal(8, 4)}, normal(2, 8)
    fn, q = quantize(lambda p, x: x @ p["w"], params, x, formats={"*": w8a8})
    assert jnp.array_equal(autocast(fn)(q, x), fn(q, x))


def test_a_function_without_a_product_to_cast_is_refused():
    with pytest.raises(ValueError, match="nothing runs in bfloat16.*none at all"):
        autocast(lambda w, x: w + x)(jnp.ones(3), jnp.ones(3))
    by_hand = lambda w, x: jnp.dot(x, w, precision="highest")
    with pytest.raises(ValueError, match="nothing runs in bfloat16.*1 in float32"):
        autocast(by_hand)(jnp.ones((3, 3)), jnp.ones((3, 3)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, np.float64])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        autocast(lambda w, x: x @ w, dtype)


def test_a_quantized_model_in_bfloat16_has_its_products_in_bfloat16_already(normal):
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    low = lambda *shape: normal(*shape).astype(jnp.bfloat16)
    params, x = {"a": low(8, 8), "b": low(8, 4)}, low(2, 8)
    fn, params = quantize(fn, params, x)
    assert jnp.array_equal(autocast(fn)(params, x), fn(params, x))
    with pytest.raises(ValueError, match="found these products: 2 in bfloat16"):
        autocast(fn, jnp.float16)(params, x)


@pytest.mark.parametrize("given", [{"dtype": "bf16"}, {"outputs": "half a float"}])
def test_what_is_no_dtype_is_one_clear_line(given):
    with pytest.raises(ValueError, match=f"no dtype.*{next(iter(given.values()))}"):
        autocast(lambda p: p, **given)
