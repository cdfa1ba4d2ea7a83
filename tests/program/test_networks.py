"""Whatever the network: a coupling is frozen, or removing from it equals masking.

Run more of them with HYPOTHESIS_PROFILE=thorough.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxeff import trace
from jaxeff.program import keep_indices, zero_indices
from tests.conftest import PROFILE
from tests.program.more_networks import OPERATIONS
from tests.program.networks import network
from tests.program.shrinking import distance, random_keep, shrunk

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
number = st.integers(0, 59)
steps = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), number, number),
    min_size=1,
    max_size=6,
)
examples = itertools.count(1)


@pytest.fixture(autouse=True)
def double_precision():
    # So that what rounding does cannot be taken for a fault, nor a fault for it.
    with jax.enable_x64(True):
        yield


def check(steps, seed, gradient=False):
    """The law for one network; says how many couplings were free."""
    if next(examples) % 100 == 0:
        jax.clear_caches()  # else thousands of networks stay compiled
    rng = np.random.default_rng(seed)
    shapes = {}
    x = jax.ShapeDtypeStruct((2, 4, 5), jnp.float64)
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    jax.eval_shape(lambda x, t: network(steps, shapes)({}, x, t), x, tokens)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    fn = network(steps)
    couplings = trace(fn, params, x, tokens).couplings
    if not couplings.free:
        return 0
    keep = random_keep(couplings, rng, rng.choice([0.2, 0.5, 0.8]))
    small_fn, small = shrunk(fn, params, couplings, keep)
    full = zero_indices(params, couplings, keep)
    # Another batch size than it was traced with.
    args = rng.normal(size=(3, 4, 5)), rng.integers(0, 7, (3, 4)).astype(np.int32)
    want = jit(fn)(full, *args)
    if np.isfinite(want).all():
        assert distance(jit(small_fn)(small, *args), want) < 1e-9, couplings
    if gradient:
        loss = lambda fn: lambda params: jnp.sum(jnp.sin(fn(params, *args)))
        try:
            want = keep_indices(jit(jax.grad(loss(fn)))(full), couplings, keep)
        except NotImplementedError:  # JAX has none of `nextafter`
            return 0
        if all(np.isfinite(g).all() for g in jax.tree.leaves(want)):
            got = jit(jax.grad(loss(small_fn)))(small)
            assert distance(got, want) < 1e-6, couplings
    return len(couplings.free)


@settings(max_examples=25 if PROFILE == "ci" else settings().max_examples)
@given(steps, st.integers(0, 10**6))
def test_a_coupling_is_frozen_or_removing_from_it_equals_masking(steps, seed):
    check(steps, seed)


@pytest.mark.slow
@settings(max_examples=20 if PROFILE == "ci" else settings().max_examples)
@given(steps, st.integers(0, 10**6))
def test_and_so_are_its_gradients(steps, seed):
    # A while has no gradient, nor has a window of one's own sum.
    steps = [s for s in steps if s[0] not in ("loop", "own_window")]
    check(steps, seed, gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_between_two_layers_in_each_of_its_forms(name):
    free = 0
    for i, j in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 6), (10, 7)]:
        free += check([("dense", 3, i), (name, i, j), ("dense", 1, j)], 100 * i + j)
    assert free
