"""Bodies: loops, branches, custom derivatives, rematerialisation, shards."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff.precision import autocast
from jaxeff.precision.rules import PRODUCTS
from jaxeff.program import equations

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def run_dtypes(fn, *args):
    """For each primitive the dtypes that its operands and results have."""
    found = {}
    for _, eqn, _ in equations(jax.make_jaxpr(fn)(*args)):
        for v in (*eqn.invars, *eqn.outvars):
            found.setdefault(eqn.primitive.name, set()).add(v.aval.dtype)
    return found


def close(a, b, rtol=1e-2):
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return jnp.linalg.norm(a - b) <= rtol * jnp.linalg.norm(b)


def matrices(key, n, size=4):
    return 0.5 * jr.normal(key, (n, size, size))


def test_a_sum_over_turns_stays_in_float32():
    def count(w, x):
        """In bfloat16, 256 + 1 is 256."""
        add = lambda total, row: (total + (row @ w)[0], None)
        return jax.lax.scan(add, 0.0, x)[0]

    assert autocast(count)(jnp.ones((1, 1)), jnp.ones((1000, 1))) == 1000


def test_a_carry_takes_the_widest_dtype_it_meets(getkey):
    # The first carry is a product in bfloat16, but a turn makes float32 of it.
    def fn(w, x):
        turn = lambda y, _: (jnp.exp(-y @ w), None)
        return jax.lax.scan(turn, x @ w, length=3)[0]

    def swap(w, x):
        # It takes three turns until all three are float32.
        turn = lambda _, s: (s[1], s[2], jnp.exp(-s[0] @ w))
        return jax.lax.fori_loop(0, 4, turn, (x @ w, x @ w + 1, x @ w + 2))

    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    assert close(autocast(fn)(w, x), fn(w, x))
    for a, b in zip(autocast(swap)(w, x), swap(w, x), strict=True):
        assert close(a, b, 3e-2)
    jaxpr = jax.make_jaxpr(autocast(swap))(w, x)
    loop = next(e for _, e, _ in equations(jaxpr) if e.primitive.name == "scan")
    assert [v.aval.dtype for v in loop.outvars if v.aval.ndim == 2] == [F32] * 3


def test_a_carry_that_stays_in_bfloat16_is_carried_so(getkey):
    def fn(w, x):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x @ w, length=3)[0]

    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    jaxpr = jax.make_jaxpr(autocast(fn))(w, x)
    loop = next(e for _, e, _ in equations(jaxpr) if e.primitive.name == "scan")
    assert [v.aval.dtype for v in loop.outvars] == [BF16]


def test_the_gradient_of_a_weight_shared_by_many_turns_is_summed_in_float32():
    def fn(w, x):
        return jax.lax.scan(lambda s, row: (s + jnp.sum(row @ w), None), 0.0, x)[0]

    w, x = jnp.ones((3, 1)), jnp.ones((2000, 1, 3))
    assert jnp.array_equal(jax.grad(autocast(fn))(w, x), jax.grad(fn)(w, x))


def test_weights_of_nested_loops_are_cast_before_the_outermost(getkey):
    def fn(params, x):
        def outer(x, stacked):
            def inner(y, w):
                return jnp.tanh(y @ w @ params["shared"]), None

            return jax.lax.scan(inner, x, stacked)[0], None

        return jax.lax.scan(outer, x, params["layers"])[0]

    params = {
        "layers": matrices(getkey(), 6).reshape(2, 3, 4, 4),
        "shared": matrices(getkey(), 1)[0],
    }
    x = jr.normal(getkey(), (2, 4))
    assert close(autocast(fn)(params, x), fn(params, x), 2e-2)
    weights = jax.grad(lambda p: jnp.sum(autocast(fn)(p, x)))(params)
    true = jax.grad(lambda p: jnp.sum(fn(p, x)))(params)
    for name in params:
        assert weights[name].dtype == F32 and close(weights[name], true[name], 4e-2)
    for where, eqn, _ in equations(jax.make_jaxpr(autocast(fn))(params, x)):
        if eqn.primitive.name == "convert_element_type" and len(where) > 1:
            assert eqn.invars[0].aval.shape == x.shape  # the carry, no weight


def test_layers_picked_by_a_counter_are_cast_before_the_loop(getkey):
    def fn(ws, x):
        def turn(state):
            i, y = state
            return i + 1, jnp.tanh(y @ ws[i])

        def go_on(state):
            return (state[0] < 3) & (jnp.sum(ws[0]) < 1e9)

        return jax.lax.while_loop(go_on, turn, (0, x))[1]

    ws, x = matrices(getkey(), 3), jr.normal(getkey(), (2, 4))
    assert close(autocast(fn)(ws, x), fn(ws, x), 2e-2)
    jaxpr = jax.make_jaxpr(autocast(fn))(ws, x)
    casts = [
        (len(where) > 1, e.invars[0].aval.shape)
        for where, e, _ in equations(jaxpr)
        if e.primitive.name == "convert_element_type"
        and (e.invars[0].aval.dtype, e.outvars[0].aval.dtype) == (F32, BF16)
    ]
    assert (False, ws.shape) in casts
    assert all(shape == x.shape for inside, shape in casts if inside)


def test_branches_agree_on_the_wider_dtype(getkey):
    def fn(w, x):
        return jax.lax.switch(
            jnp.argmax(x[0]) % 3,
            [lambda y: y @ w, lambda y: jnp.exp(-(y @ w)), lambda y: y],
            x @ w,
        )

    w = matrices(getkey(), 1)[0] / 4
    for i in range(3):
        x = jr.normal(getkey(), (2, 4)).at[0, i].set(4)
        assert close(autocast(fn)(w, x), fn(w, x))
    jaxpr = jax.make_jaxpr(autocast(fn))(w, x)
    cond = next(e for _, e, _ in equations(jaxpr) if e.primitive.name == "cond")
    assert cond.outvars[0].aval.dtype == F32
    assert cond.invars[1].aval.dtype == BF16 or cond.invars[2].aval.dtype == BF16


@jax.custom_jvp
def softclip(x):
    return jnp.tanh(x)


@softclip.defjvp
def _(primals, tangents):
    # Not tanh's own: a rule that is lost would show.
    return softclip(primals[0]), 3 * tangents[0] * jnp.exp(-jnp.square(primals[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def passed(x, gain):
    return jnp.round(x)


passed.defvjp(lambda x, gain: (jnp.round(x), x), lambda gain, x, g: (gain * g * x,))


@pytest.mark.parametrize("rule", [softclip, lambda x: passed(x, 5.0)])
@pytest.mark.parametrize("around", ["plain", "jit", "scan", "remat"])
def test_custom_derivatives_keep_their_rules(rule, around, getkey):
    def fn(w, x):
        layer = lambda y: rule(y @ w)
        if around == "scan":
            return jax.lax.scan(lambda y, _: (layer(y), None), x, length=2)[0]
        return {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}[around](
            layer
        )(x)

    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    # Where `round` is near a step, bfloat16 may fall to the other side.
    x = jnp.round(4 * x) / 4
    w = jnp.round(2 * w) / 2
    grad = lambda f: jax.grad(lambda w: jnp.sum(f(w, x)))(w)
    assert close(grad(autocast(fn)), grad(fn), 2e-2)


def test_rematerialisation_stays(getkey):
    def fn(w, x):
        block = lambda y: jnp.tanh(jnp.tanh(y @ w) @ w)
        policy = jax.checkpoint_policies.everything_saveable
        return jax.checkpoint(block, policy=policy, prevent_cse=False)(x)

    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    remats = [
        e
        for _, e, _ in equations(jax.make_jaxpr(autocast(fn))(w, x))
        if e.primitive.name in ("remat2", "checkpoint")
    ]
    assert [e.params["prevent_cse"] for e in remats] == [False]
    assert remats[0].params["policy"] is jax.checkpoint_policies.everything_saveable


def test_a_shard_map_runs_inside_too_and_biases_do_not_widen_there(getkey):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def fn(params, x):
        def local(params, x):
            y = jnp.where(x > 0, x, 0.1 * x) @ params["w"] + params["bias"][None]
            return jax.lax.psum(y * 2.0, "data"), y

        return jax.shard_map(
            local, mesh=mesh, in_specs=(jax.P(), spec), out_specs=(jax.P(), spec)
        )(params, x)

    params = {"w": matrices(getkey(), 1)[0], "bias": jr.normal(getkey(), (4,))}
    x = jr.normal(getkey(), (8, 4))
    low = jax.jit(autocast(fn))
    for a, b in zip(low(params, x), fn(params, x), strict=True):
        assert close(a, b)
    loss = lambda f: lambda p: jnp.sum(jnp.square(f(p, x)[0]))
    grads, true = (
        jax.jit(jax.grad(loss(autocast(fn))))(params),
        jax.grad(loss(fn))(params),
    )
    assert close(grads["w"], true["w"], 2e-2) and close(
        grads["bias"], true["bias"], 2e-2
    )
    (inside,) = [
        e
        for _, e, _ in equations(jax.make_jaxpr(autocast(fn))(params, x))
        if e.primitive.name == "shard_map"
    ]
    assert BF16 in [v.aval.dtype for v in inside.outvars]


def test_a_bias_and_a_scale_do_not_widen_but_are_not_rounded_either(getkey):
    """257 is not a bfloat16 number: the sum is rounded, not the bias."""

    def fn(params, x):
        y = x @ params["w"]
        return ((y + params["bias"][None]) * params["scale"][None]) @ params["w"]

    params = {"w": jnp.eye(4), "bias": jnp.full(4, 257.0), "scale": jnp.full(4, 0.5)}
    x = jnp.full((2, 4), -255.0)
    assert jnp.all(autocast(fn)(params, x) == 1.0)
    jaxpr = jax.make_jaxpr(autocast(fn))(params, x)
    last = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"][-1]
    assert last.invars[0].aval.dtype == BF16
    made = {v: e for e in jaxpr.jaxpr.eqns for v in e.outvars}
    assert made[last.invars[0]].primitive.name not in PRODUCTS
    # The gradient of a bias sums over a batch: 2000 ones are no bfloat16 sum.
    x = jnp.zeros((2000, 4))
    grads = jax.grad(lambda p: jnp.sum(autocast(fn)(p, x)))(params)
    assert jnp.all(grads["bias"] == 1000)


def test_data_in_float32_does_widen(getkey):
    def fn(w, x):
        return jnp.tanh(x @ w) + x  # a residual stream in float32

    w, x = matrices(getkey(), 1)[0], 1000 + jr.normal(getkey(), (3, 4))
    assert jnp.allclose(autocast(fn)(w, x), x + fn(w, x) - x, atol=1e-2)
    assert run_dtypes(autocast(fn), w, x)["add"] == {F32}


def test_a_softmax_is_float32_from_the_scores_on(getkey):
    def fn(w, x):
        scores = jnp.einsum("qd,kd->qk", x @ w, x @ w) * 0.3
        mask = jnp.tril(jnp.ones((8, 8), bool))
        return jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ x

    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (8, 4))
    found = run_dtypes(autocast(fn), w, x)
    for name in ("mul", "sub", "reduce_max", "exp", "reduce_sum", "div"):
        assert found[name] == {F32}, name
    assert close(autocast(fn)(w, x), fn(w, x))


def test_constants_of_the_program_are_data(getkey):
    table = np.asarray(jr.normal(getkey(), (3, 4)))
    fn = lambda w, x: x @ w + table
    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    assert run_dtypes(autocast(fn), w, x)["add"] == {F32}


def test_numpy_arrays_are_as_good_as_any(getkey):
    fn = lambda w, x: jnp.tanh(x @ w["w"] + w["bias"]) * w["gain"] + x
    w = {"w": matrices(getkey(), 1)[0], "bias": jnp.ones(()), "gain": jnp.float32(0.1)}
    x = jr.normal(getkey(), (3, 4))
    y = autocast(fn)(jax.tree.map(np.asarray, w), np.asarray(x))
    assert y.dtype == F32 and jnp.array_equal(y, autocast(fn)(w, x))


def test_nothing_of_a_program_is_left_in_the_interpreter(getkey):
    """A tracer kept from one trace would break the next."""
    fn = autocast(lambda w, x: jax.lax.scan(lambda y, _: (y @ w, None), x, length=2)[0])
    w, x = matrices(getkey(), 1)[0], jr.normal(getkey(), (3, 4))
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda w: jnp.sum(fn(w, x))))(w)
