import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff.pruning import Blocks, make_masks, NofM, Unstructured

CONV = {"kernel": (3, 3, 8, 5)}


def masks(w, sparsity, pattern):
    return np.asarray(make_masks({"w": jnp.abs(w)}, sparsity, pattern=pattern)["w"])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (7, 36), (1, 3)])
@pytest.mark.parametrize("dims", [(0, 1, 2), (3, 2), 2])
def test_n_of_m_holds_in_every_group_and_keeps_the_largest(n, m, dims, normal):
    w = normal(3, 3, 12, 24)
    order = [dims] if isinstance(dims, int) else list(dims)
    if np.prod([w.shape[d] for d in order]) % m:
        with pytest.raises(ValueError, match=f"groups of {m} divide the .*w of"):
            masks(w, 1 - n / m, NofM(n, m, dims))
        return
    mask = masks(w, 1 - n / m, NofM(n, m, dims))
    groups = lambda x: np.moveaxis(x, order, range(-len(order), 0)).reshape(-1, m)
    kept, size = groups(mask), groups(np.abs(np.asarray(w)))
    assert np.all(kept.sum(1) == n)
    smallest_kept = np.where(kept, size, np.inf).min(1)
    assert np.all(smallest_kept >= np.where(kept, -np.inf, size).max(1))


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (6, 1), (1, 1), (3, 8)])
def test_tiles_go_as_a_whole_and_those_of_the_smallest_sum(rows, columns, normal):
    w = normal(12, 16)
    mask = masks(w, 0.5, Blocks(rows, columns))
    tiles = lambda x: x.reshape(12 // rows, rows, 16 // columns, columns)
    kept, sums = tiles(mask), tiles(np.abs(np.asarray(w))).sum((1, 3))
    assert np.array_equal(kept.any((1, 3)), kept.all((1, 3)))
    kept = kept.all((1, 3))
    assert (~kept).sum() == round(0.5 * kept.size)
    assert sums[kept].min() > sums[~kept].max()


@given(sparsity=st.floats(0.3, 0.7), per=st.sampled_from([(), 0, -1, (0, 2), (2, 0)]))
def test_every_index_of_the_dims_per_has_its_own_count(sparsity, per):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 4)), jnp.float32)
    mask = masks(w, sparsity, Unstructured(per=per))
    per = [d % 3 for d in ((per,) if isinstance(per, int) else per)]
    along = tuple(d for d in range(3) if d not in per)
    n = np.prod([w.shape[d] for d in along])
    dropped = (~mask).sum(axis=along)
    assert np.all(dropped == np.round(np.float32(sparsity) * np.float32(n)))


def test_tiles_of_a_stack_are_counted_layer_by_layer(normal):
    w = normal(3, 4, 8) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    mask = masks(w, 0.5, Blocks(2, 4, per=0))
    assert np.all((~mask).sum((1, 2)) == 16)
    assert not np.all((~masks(w, 0.5, Blocks(2, 4))).sum((1, 2)) == 16)


def test_a_dim_is_given_once_and_exists(normal):
    w = normal(4, 8)
    for dims, says in [((0, 0), "given once"), (2, "has 2 dims"), ((-3,), "2 dims")]:
        with pytest.raises(ValueError, match=says):
            masks(w, 0.5, NofM(2, 4, dims))
        with pytest.raises(ValueError, match=says):
            masks(w, 0.5, Unstructured(per=dims))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "says"),
    [
        (NofM(2, 5, 1), 0.6, "groups of 5 divide the 8 weights.*w .*3 are left"),
        (NofM(2, 4, 1), 0.9, "2:4 drops 0.5 .* ends at 0.9"),
        (NofM(2, 4, {"other": 1}), 0.5, "none are known for w.*weight_dims"),
        (Blocks(3, 1), 0.5, r"tiles of 3 x 1 .*\[4, 8\].*divisors of \[4, 8\]"),
        (Blocks(0, 1), 0.5, "tiles of 0 x 1"),
        (Blocks(4, 4), 0.1, "into 2, so sparsity 0.1 would drop 0"),
        (Blocks(4, 4), 0.9, "into 2, so sparsity 0.9 would drop 2"),
        (Blocks(1, 1, dims=0), 0.5, "lies along two dims"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern, sparsity, says, normal):
    with pytest.raises(ValueError, match=says):
        masks(normal(4, 8), sparsity, pattern)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_n_of_m_keeps_some_but_not_all(n, m):
    with pytest.raises(ValueError, match="0 < n < m"):
        NofM(n, m, 0)
