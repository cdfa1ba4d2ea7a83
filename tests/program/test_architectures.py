"""Well-known architectures really shrink, and equal their masked selves."""

import functools
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jaxeff import pruning, trace
from tests.architectures import Architecture, ARCHITECTURES
from tests.program.shrinking import distance

# Compiling is most of the time, and the numbers need no optimisation.
# Of this module, what takes longer than 5 s.
SLOW = {
    "test_half_of_it_equals_its_masked_self[linen_resnext]",
}

QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)
every = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.case.name, marks=[pytest.mark.slow] if a.slow else [])
        for a in ARCHITECTURES
    ],
)


@functools.cache
def build(architecture: Architecture):
    fn, params, args = architecture.case.build(jr.key(0))
    params, args = jax.tree.map(np.asarray, (params, args))
    return fn, params, args, trace(fn, params, *args).couplings


def halved(fn, params, args):
    """The model at 50 %, and the same weights with zeros where it lost some.

    Which ones stay is seen from the outside: the weights are numbered, and shrunk
    with their numbers for values.
    """
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])
    order = np.random.default_rng(0).permutation(ends[-1]) + 1
    assert ends[-1] < 2**24  # float32 tells them apart
    numbers = [
        jnp.asarray(n.reshape(x.shape), jnp.float32)
        for n, x in zip(np.split(order, ends[:-1]), leaves, strict=True)
    ]
    small_fn, kept = pruning.shrink(
        fn, jax.tree.unflatten(structure, numbers), *args, keep=0.5
    )
    values = np.zeros(ends[-1] + 1, np.float32)
    values[order] = np.concatenate([x.ravel() for x in leaves])
    small = jax.tree.map(lambda k: values[np.asarray(k).astype(int)], kept)
    masked = [
        np.where(np.isin(n, np.asarray(k)), x, 0)
        for n, k, x in zip(numbers, jax.tree.leaves(kept), leaves, strict=True)
    ]
    return small_fn, small, jax.tree.unflatten(structure, masked)


def at(couplings, path, dim, size):
    """The couplings of that size at a dim of a weight."""
    found = [c for c in couplings if (path, dim) in c.members and c.size == size]
    assert found, [c for c in couplings if path in dict(c.members)]
    return found


@every
def test_what_an_expert_would_prune_is_free_and_what_is_not_says_why(architecture):
    couplings = build(architecture)[-1]
    for place in architecture.free:
        assert any(not c.frozen for c in at(couplings, *place)), at(couplings, *place)
    for *place, reason in architecture.frozen:
        frozen = [c.reason for c in at(couplings, *place) if c.frozen]
        assert any(re.match(reason, r) for r in frozen), frozen
    for c in couplings:
        if c.frozen and "a dim of the" not in c.reason:
            assert re.search(r" at \w+\.py:\d+ \(.*\)$", c.reason), c.reason


@every
def test_half_of_it_equals_its_masked_self(architecture):
    fn, params, args, couplings = build(architecture)
    small_fn, small, masked = halved(fn, params, args)
    before = {c.size for c in couplings.free}
    left = trace(small_fn, small, *args).couplings
    # As many couplings as before, each half as large; one index is no coupling.
    halves = sorted(max(1, round(c.size / 2)) for c in couplings.free)
    assert sorted(c.size for c in left.free) == [n for n in halves if n > 1], before
    more = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), args)
    assert distance(jit(small_fn)(small, *more), jit(fn)(masked, *more)) < 1e-5
