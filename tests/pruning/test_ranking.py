import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxeff.parallelism import make_mesh
from jaxeff.pruning.ranking import _sum, order_keys, shared_counts, smallest

FLOATS = st.floats(width=32, allow_subnormal=False)


@given(x=st.lists(FLOATS, min_size=12, max_size=12))
def test_keys_are_in_the_order_of_the_numbers_and_nan_is_the_largest(x):
    x = np.array([*x, 0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    keys = np.asarray(jax.jit(order_keys)(x)).astype(np.int64)
    a, b = x[:, None], x[None, :]
    ka, kb = keys[:, None], keys[None, :]
    assert np.all((ka < kb)[a < b])
    assert np.all((ka == kb)[a == b])
    assert np.all(keys[np.isnan(x)] == 2**31 - 1)


def first_smallest(x, count):
    """The reference: a stable sort."""
    taken = np.zeros(x.size, bool)
    taken[np.argsort(x.ravel(), kind="stable")[:count]] = True
    return taken.reshape(x.shape)


@given(seed=st.integers(0, 999), ties=st.sampled_from([1, 4, 10**6]))
def test_the_smallest_of_every_slice_are_those_of_a_stable_sort(seed, ties):
    rng = np.random.default_rng(seed)
    along = ((0, 1, 2), (0, 2), (2,), (1,))
    shapes = [(3, 5, 4), (6, 2, 9), (4, 3, 33), (5, 4, 2)]
    rows = [(1, 1, 1), (1, 2, 1), (4, 3, 1), (5, 1, 2)]
    keys = [rng.integers(-ties, ties, s).astype(np.int32) for s in shapes]
    counts = [
        rng.integers(0, k.size // np.prod(r) + 1, r).astype(np.int32)
        for k, r in zip(keys, rows, strict=True)
    ]
    found = smallest(keys, counts, along)
    for key, count, dims, taken in zip(keys, counts, along, found, strict=True):
        rest = [d for d in range(3) if d not in dims]
        for i in np.ndindex(*[key.shape[d] for d in rest]):
            at = [slice(None)] * 3
            for d, j in zip(rest, i, strict=True):
                at[d] = slice(j, j + 1)
            at = tuple(at)
            expected = first_smallest(
                key[at], count[at].item() if rest else count.item()
            )
            assert np.array_equal(taken[at], expected)


@given(seed=st.integers(0, 999), ties=st.sampled_from([1, 3, 10**6]))
def test_shared_counts_are_those_of_one_sort_of_all(seed, ties):
    rng = np.random.default_rng(seed)
    keys = [
        rng.integers(-ties, ties, s).astype(np.int32) for s in [(4, 5), (30,), (7,)]
    ]
    sparsity = np.float32(rng.uniform())
    counts = shared_counts(keys, sparsity)
    flat = np.concatenate([k.ravel() for k in keys])
    taken = first_smallest(flat, int(np.round(sparsity * np.float32(flat.size))))
    parts = np.split(taken, [20, 50])
    assert [int(c) for c in counts] == [int(p.sum()) for p in parts]


def test_counts_add_up_beyond_what_an_int32_holds():
    counts = [2**31 - 1, 2**31 - 5, 70_000, 3]
    high, low = _sum([jnp.int32(c) for c in counts])
    assert int(high) * 65536 + int(low) == sum(counts)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("data", None)])
def test_arrays_that_are_spread_over_devices_stay_there(spec, normal):
    """Only counts travel: no device ever sees the weights of another."""
    mesh = make_mesh()
    w = jax.device_put(normal(32, 40), NamedSharding(mesh, spec))

    def taken(w):
        keys = order_keys(w)
        counts = shared_counts([keys, keys], 0.3)
        return smallest([keys], counts[:1], ((0, 1),))[0]

    compiled = jax.jit(taken).lower(w).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(op in text for op in ("all-gather", "all-to-all", "permute"))
    found = compiled(w)
    assert found.sharding.is_equivalent_to(w.sharding, 2)
    assert np.array_equal(found, first_smallest(np.asarray(w), int(found.sum())))
