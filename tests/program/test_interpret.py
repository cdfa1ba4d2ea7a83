"""Running a program again changes nothing, and everything inside is met."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxeff.program import bind, bodies, equations, Interpreter
from jaxeff.program.call import Call
from tests.program.built import build, zoo


class Opened(Interpreter):
    """Rebuilds the functions that have a derivative rule of their own, too."""

    def keeps_types(self, eqn, args, where):
        return False


def again(fn, rule=Interpreter):
    """`fn`, traced and run by an interpreter."""
    return lambda *args: Call(fn, args[0], args[1:], {}).run(rule())


def same(a, b):
    """Equal bit for bit, in value, dtype and structure."""

    def bits(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x.dtype, bits(jr.key_data(x))
        return x.dtype, x.weak_type, x.shape, np.asarray(x).tobytes()

    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


X = jr.normal(jr.key(0), (4, 8))


# Every primitive that holds a program, and what can go wrong around them.


def scan_both_ways(x):
    def step(c, a):
        return jnp.tanh(c + a), (c * a, a.sum())

    one = lax.scan(step, jnp.zeros(8), x, reverse=True)
    two = lax.scan(step, jnp.zeros(8), x, unroll=3)
    return one, two, lax.scan(lambda c, _: (c * 0.9, None), x, None, length=3)


def scan_of_weak_numbers(x):
    return lax.scan(lambda c, a: (c + a.sum(), 2.0), 0.0, x), x * 2


def scan_without_carry(x):
    return lax.map(lambda a: a[::-1], x), lax.scan(lambda c, a: (c, a + 1), None, x)


def scan_of_nothing(x):
    return lax.scan(lambda c, a: (c + a, c), jnp.ones(8), x[:0])


def nested(x):
    """A scan in a cond in a while."""

    def turn(state):
        i, y = state
        y = lax.cond(
            i % 2 == 0,
            lambda y: (
                lax.scan(lambda c, a: (c + jnp.sin(a), None), y[0], y)[0][None] + y
            ),
            lambda y: y * 0.5,
            y,
        )
        return i + 1, y

    return lax.while_loop(lambda s: (s[0] < 5) & (s[1].sum() < 1e3), turn, (0, x))


def while_with_constants(x):
    limit, step = x.max(), x[0]
    return lax.while_loop(
        lambda y: y.max() < limit + 3, lambda y: y + step[None] ** 2 + 1, x
    )


def counted(x):
    return lax.fori_loop(0, 3, lambda i, y: y * i + 1.0, x), lax.fori_loop(
        0, x.astype(int)[0, 0] % 3 + 2, lambda i, y: y + i, x
    )


def switch(x):
    branches = [lambda y: y, lambda y: y * 2, lambda y: (y @ y.T) @ y]
    return [lax.switch(i, branches, x) for i in (0, 2, x.astype(int)[0, 0] % 3)]


def branch_of_literals(x):
    return lax.cond(x[0, 0] > 0, lambda: (1.0, 2), lambda: (0.0, 3))


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("kept")
)
def remat(x):
    y = checkpoint_name(jnp.sin(x), "kept")
    return jnp.tanh(y @ y.T) @ x


def remat_in_scan(x):
    body = jax.checkpoint(
        lambda c, a: (jnp.tanh(c @ x.T @ x) * a, c),
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_saveable,
    )
    return lax.scan(body, x[0], x)


def several_of_one(x):
    f = jax.jit(lambda x: (jnp.sin(x), x))
    return f(f(x)[0]), f(x)[1], x, x


def constants_out(x):
    return jnp.arange(3), 1.0, x, jnp.float32(2), ()


def dropped(x):
    a, _, c = jax.jit(lambda x: (x + 1, jnp.cos(x), x.sum()))(x)
    lax.scan(lambda c, a: (c + a, None), x[0], x)
    return c, lax.sort((a, x), num_keys=1)[1]


def closed_over(x):
    table = np.linspace(0, 1, 8, dtype=np.float32)[None]
    return jax.jit(lambda x: x + table)(x) * jnp.array([[1.5]])


def weak(x):
    return (
        jnp.float32(1) * 2.0,
        x.sum() * 3,
        jnp.asarray(4.0),
        x.astype(jnp.bfloat16) * 2.0,
    )


def keys(x):
    def step(key, a):
        key, new = jr.split(key)
        return key, a + jr.normal(new, a.shape)

    key, y = lax.scan(step, jr.key(1), x)
    chosen = lax.cond(x[0, 0] > 0, lambda k: jr.fold_in(k, 1), lambda k: k, key)
    old = jr.bernoulli(jr.PRNGKey(2), 0.5, x.shape)
    return key, chosen, y, old, jr.split(key, 3)


def integers(x):
    i = jnp.argsort(x, axis=1)
    return jnp.take_along_axis(x, i, 1), i % 3 == 0, ~(x > 0), i << 2


def opaque(x):
    y = jnp.linalg.solve(x @ x.T + 4 * jnp.eye(4), x)
    return y, lax.associative_scan(jnp.add, x), jnp.cumsum(x, 0)


@jax.custom_vjp
def wrong(x, scale):
    return jnp.sin(x) * scale


wrong.defvjp(
    lambda x, s: (jnp.sin(x) * s, (x, s)), lambda xs, g: (g * 42 * xs[0], xs[1] * 7)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wrong_with_options(n, x, i):
    return x * n + i, i


wrong_with_options.defvjp(
    lambda n, x, i: (wrong_with_options(n, x, i), x.shape),
    lambda n, shape, g: (jnp.full(shape, 5.0 * n) + g[0], None),
)


@jax.custom_jvp
def steep(x, i):
    return x * i, i + 1


@steep.defjvp
def _steep_jvp(primals, tangents):
    (x, i), (t, _) = primals, tangents
    return steep(x, i), (t * 100 * x, np.zeros(i.shape, jax.dtypes.float0))


def own_derivatives(x):
    y = wrong(x, 2.0) + jax.nn.relu(x) + jax.nn.logsumexp(x, 1, keepdims=True)
    z, i = wrong_with_options(3, y, jnp.int32(2))
    z, i = steep(z, i)
    return z + jax.nn.silu(y), i


def own_derivatives_inside(x):
    def body(c, a):
        c = jax.checkpoint(lambda c: wrong(c, a))(c)
        return jnp.where(c > 0, c, steep(c, jnp.int32(2))[0]), c

    return lax.scan(body, x[0], x)[0]


def derivative_inside(x):
    return jax.grad(lambda x: own_derivatives(x)[0].sum())(x)


def sharded(x):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)

    def local(x, w):
        y = jnp.tanh(x @ w)
        y = lax.scan(lambda c, a: (c + a, None), y[0], y)[0]
        return lax.psum(y[None], "b"), lax.pmean(w.sum(), "b")

    specs = dict(in_specs=(P("a"), P(None, "b")), out_specs=(P("a"), P()))
    return jax.shard_map(local, mesh=mesh, **specs)(x, x.T @ x)


PROGRAMS = [
    scan_both_ways,
    scan_of_weak_numbers,
    scan_without_carry,
    scan_of_nothing,
    nested,
    while_with_constants,
    counted,
    switch,
    branch_of_literals,
    remat,
    remat_in_scan,
    several_of_one,
    constants_out,
    dropped,
    closed_over,
    weak,
    keys,
    integers,
    opaque,
    own_derivatives,
    own_derivatives_inside,
    derivative_inside,
    sharded,
]
RULED = [own_derivatives, own_derivatives_inside, derivative_inside]
both = pytest.mark.parametrize("rule", [Interpreter, Opened])


def programs(*fns):
    """Each with the interpreter; with rules of their own, also opened."""
    cases = [(fn, Interpreter) for fn in fns]
    cases += [(fn, Opened) for fn in fns if fn in RULED]
    name = lambda x: x.__name__
    return pytest.mark.parametrize("fn, rule", cases, ids=name)


def both_ways(fn, other, *args):
    """What both give, compiled as one program: that takes half the time."""
    return jax.jit(lambda *args: (fn(*args), other(*args)))(*args)


@programs(*PROGRAMS)
def test_running_again_changes_no_bit(fn, rule):
    assert same(*both_ways(fn, again(fn, rule), X))


def loss(fn):
    """A number that all floating-point outputs of `fn` go into."""

    def run(x):
        floats = [
            y
            for y in jax.tree.leaves(fn(x))
            if jnp.issubdtype(jnp.asarray(y).dtype, jnp.floating)
        ]
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in floats)

    return run


@programs(
    scan_both_ways,
    scan_of_weak_numbers,
    switch,
    remat,
    remat_in_scan,
    several_of_one,
    dropped,
    closed_over,
    weak,
    keys,
    opaque,
    own_derivatives,
    own_derivatives_inside,
    sharded,
)
def test_the_gradient_keeps_every_bit(fn, rule):
    fn, other = loss(fn), loss(again(fn, rule))
    assert same(*both_ways(jax.grad(fn), jax.grad(other), X))


@both
def test_a_derivative_rule_that_is_wrong_stays_wrong(rule):
    fn = again(wrong, rule)
    assert jnp.allclose(jax.grad(lambda x: fn(x, 2.0).sum())(X), 42 * X)
    assert jnp.allclose(jax.grad(lambda s: fn(X, s).sum())(2.0), 14)
    fn = again(lambda x: steep(x, jnp.int32(3))[0], rule)
    assert jnp.allclose(jax.jvp(fn, (X,), (X,))[1], 100 * X * X)


def test_opening_a_rule_without_keeping_it_would_be_noticed():
    class Inlined(Interpreter):
        def equation(self, eqn, args, where):
            if eqn.primitive.name.startswith("custom_vjp"):
                return self.inline(eqn, args, where)

    fn = again(wrong, Inlined)
    got = jax.grad(lambda x: fn(x, 2.0).sum())(X)
    assert jnp.allclose(got, 2 * jnp.cos(X), atol=1e-6)


@programs(while_with_constants, nested, counted)
def test_forward_derivatives_go_through_loops(fn, rule):
    jvp = lambda fn: lambda x: jax.jvp(loss(fn), (x,), (x,))
    assert same(*both_ways(jvp(fn), jvp(again(fn, rule)), X))


@programs(
    scan_both_ways,
    nested,
    counted,
    switch,
    branch_of_literals,
    remat_in_scan,
    constants_out,
    keys,
    own_derivatives,
    own_derivatives_inside,
    sharded,
)
def test_batching_changes_no_bit(fn, rule):
    xs = jr.normal(jr.key(3), (3, 4, 8))
    assert same(*both_ways(jax.vmap(fn), jax.vmap(again(fn, rule)), xs))


@zoo
def test_every_model_of_the_zoo_keeps_every_bit(case):
    model = build(case)
    run = lambda params, *args: Call(model.fn, params, args, {}).run(Interpreter())
    got = jax.jit(run)(model.params, *model.args)
    assert same(got, model.jitted(model.params, *model.args))


def test_integers_get_no_gradient_and_inexact_numbers_all_of_theirs():
    def fn(x, i):
        return wrong_with_options(3, x, i)[0].sum()

    for rule in (Interpreter, Opened):
        dx, di = jax.grad(again(fn, rule), argnums=(0, 1), allow_int=True)(
            X, jnp.int32(2)
        )
        assert di.dtype == jax.dtypes.float0
        assert jnp.all(dx == 16)


class Doubled(Interpreter):
    """Doubles what every sine gives, wherever it is, and counts them."""

    def __init__(self):
        super().__init__()
        self.met = []

    def equation(self, eqn, args, where):
        if eqn.primitive.name == "sin":
            self.met.append(where)
            return [2 * y for y in bind(eqn, args)]

    def opens(self, eqn, args):
        return True

    def keeps_types(self, eqn, args, where):
        return False


INSIDE = {
    "jit": jax.jit(jnp.sin),
    "scan": lambda x: lax.map(jnp.sin, x),
    "while": lambda x: lax.while_loop(
        lambda s: s[0] < 1, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, x)
    )[1],
    "cond": lambda x: lax.cond(True, jnp.sin, jnp.cos, x),
    "remat": jax.checkpoint(jnp.sin),
    "custom_jvp": lambda x: _sine(x),
    "custom_vjp": lambda x: wrong(x, 1.0),
    "shard_map": lambda x: jax.shard_map(
        jnp.sin,
        mesh=jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=P("a"),
        out_specs=P("a"),
    )(x),
}


@jax.custom_jvp
def _sine(x):
    return jnp.sin(x)


_sine.defjvp(lambda primals, tangents: (_sine(*primals), tangents[0] * 3))


@pytest.mark.parametrize("name", INSIDE)
def test_a_rule_acts_inside_every_primitive_that_holds_a_program(name):
    fn = INSIDE[name]
    rule = Doubled()
    got = Call(fn, X, (), {}).run(rule)
    assert jnp.allclose(got, 2 * jnp.sin(X))
    jaxpr = jax.make_jaxpr(fn)(X)
    places = [w for w, eqn, _ in equations(jaxpr) if eqn.primitive.name == "sin"]
    assert set(rule.met) == set(places) and len(places) == 1


def test_a_rule_that_acts_inside_keeps_the_derivative_rule_around_it():
    fn = lambda x: Call(_sine, x, (), {}).run(Doubled()).sum()
    assert jnp.allclose(jax.grad(fn)(X), 3)


class Emitting(Interpreter):
    """Hands out the operand of every sine."""

    def equation(self, eqn, args, where):
        if eqn.primitive.name == "sin":
            self.emit("x", args[0])


def emitted(fn, x):
    def run(x):
        call = Call(fn, x, (), {})
        return Emitting().collect(call.jaxpr, call.inputs)

    return jax.jit(run)(x)[1]


def test_what_is_emitted_arrives_from_a_call_as_it_is():
    assert same(emitted(jax.jit(jax.checkpoint(jnp.sin)), X), {"x": X})


def test_what_is_emitted_in_a_scan_arrives_stacked_in_the_order_of_the_slices():
    assert same(emitted(lambda x: lax.map(jnp.sin, x), X), {"x": X})
    back = lambda x: lax.scan(lambda c, a: (c, jnp.sin(a)), None, x, reverse=True)
    assert same(emitted(back, X), {"x": X})
    twice = lambda x: lax.map(lambda a: lax.map(jnp.sin, a), x)
    assert same(emitted(twice, X), {"x": X})


def test_what_a_branch_that_was_not_taken_would_emit_is_zero():
    fn = lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)
    one = jnp.abs(X)
    assert same(emitted(fn, one), {"x": one})
    assert same(emitted(fn, -one), {"x": jnp.zeros_like(X)})


def test_what_is_emitted_in_a_while_has_no_place_to_go():
    assert emitted(INSIDE["while"], X) == {}


def test_equations_are_enumerated_with_their_places_and_turns():
    jaxpr = jax.make_jaxpr(lambda x: (scan_both_ways(x), nested(x)))(X)
    found = {where: (eqn, times) for where, eqn, times in equations(jaxpr)}
    assert len(found) == sum(1 for _ in equations(jaxpr))
    for where, (eqn, _) in found.items():
        here, body = jaxpr, None
        for at in where[:-1]:
            if body is None:
                body = bodies(here.jaxpr.eqns[at])
            else:
                here, body = body[at].jaxpr, None
        assert here.jaxpr.eqns[where[-1]] is eqn
    turns = {eqn.primitive.name: times for eqn, times in found.values()}
    assert turns["tanh"] == 4 and turns["sin"] is None and turns["while"] == 1


def test_memory_is_let_go_after_the_last_use():
    """The interpreter holds no array that no later equation reads."""
    alive = []

    class Watching(Interpreter):
        def equation(self, eqn, args, where):
            out = bind(eqn, args)
            alive.append(sum(x.size > 1 for x in jax.live_arrays()) - before)
            return out

    def fn(x):
        for _ in range(20):
            x = x + 1.0
        return x

    call = Call(fn, X, (), {})
    before = sum(x.size > 1 for x in jax.live_arrays())
    call.run(Watching())
    assert max(alive) <= 4
