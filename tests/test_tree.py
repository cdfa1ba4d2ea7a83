import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxeff import tree

PARAMS = {
    "params": {
        "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "Dense_1": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4)},
    },
    "batch_stats": {"norm": {"mean": jnp.zeros(4), "count": jnp.int32(7)}},
}
NAMES = list(tree.paths(PARAMS))


@tree.pytree
class Everything:
    """Every kind of field, and none at its default."""

    array: jax.Array
    nested: dict[str, jax.Array]
    nothing: None
    text: str = tree.static()
    numbers: tuple[int, ...] = tree.static(default=(1,))
    scale: float = tree.static(default=1.0)


def test_flatten_then_unflatten_changes_nothing_with_every_field_off_its_default():
    x = Everything(jnp.arange(3), {"a": jnp.ones(2)}, None, "text", (4, 5), 0.5)
    leaves, treedef = jax.tree.flatten(x)
    y = jax.tree.unflatten(treedef, leaves)
    assert len(leaves) == 2
    assert (y.nothing, y.text, y.numbers, y.scale) == (None, "text", (4, 5), 0.5)
    assert y.array is x.array and y.nested["a"] is x.nested["a"]
    again = jax.tree.unflatten(*jax.tree.flatten(y)[::-1])
    assert jax.tree.structure(again) == jax.tree.structure(x)


def test_static_fields_are_structure():
    x = Everything(jnp.ones(2), {}, None, "a")
    other = Everything(jnp.ones(2), {}, None, "b")
    assert jax.tree.structure(x) != jax.tree.structure(other)
    assert jax.jit(lambda x: x)(x).text == "a"
    assert list(tree.paths(x)) == ["array"]


def test_a_pytree_is_rebuilt_around_its_checks():
    @tree.pytree
    class Checked:
        x: jax.Array

        def __post_init__(self):
            assert self.x.ndim == 1

    x = Checked(jnp.ones(2))
    assert jax.vmap(lambda x: x)(jax.tree.map(lambda x: x[None], x)).x.shape == (1, 2)
    assert jax.tree.map(lambda x: None, x).x is None


def test_a_pytree_is_frozen():
    x = Everything(jnp.ones(2), {}, None, "a")
    with pytest.raises(AttributeError):
        x.text = "b"


def test_paths_are_in_the_order_of_flatten():
    leaves = jax.tree.leaves(PARAMS)
    assert all(a is b for a, b in zip(tree.paths(PARAMS).values(), leaves, strict=True))
    assert "params/Dense_0/kernel" in NAMES


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="2 weights are called a/b"):
        tree.paths({"a/b": jnp.ones(1), "a": {"b": jnp.ones(2)}})


@pytest.mark.parametrize(
    "pattern, hits",
    [
        ("params/Dense_0/kernel", 1),
        ("**/kernel", 2),
        ("**", 7),
        ("params/*/kernel", 2),
        ("params/*", 0),
        ("params/**", 5),
        ("*/norm/**", 3),
        ("**/Dense_?/*", 4),
        ("params?norm?scale", 0),
        ("**/norm/**", 3),
        ("params/**/scale", 1),
        ("params/norm/**/scale", 1),
        (["**/bias", "**/mean"], 3),
        ("**/kerne", 0),
        ("**/[kb]*", 0),
    ],
)
def test_globs(pattern, hits):
    if hits:
        assert len(tree.match(pattern, NAMES)) == hits
    else:
        with pytest.raises(ValueError, match="matches none of the 7 weights"):
            tree.match(pattern, NAMES)


def test_double_star_also_matches_no_component():
    assert tree.match("**/kernel", ["kernel", "a/kernel"]) == ["kernel", "a/kernel"]
    assert tree.match("a/**", ["a", "a/b", "ab"]) == ["a", "a/b"]


def test_names_are_matched_whole_and_literally():
    assert tree.match("a.b", ["a.b", "axb"]) == ["a.b"]
    assert tree.match("w+", ["w+", "ww"]) == ["w+"]


def test_matches_come_in_the_order_of_the_names():
    found = tree.match(["**/scale", "**/bias", "**"], NAMES)
    assert found == NAMES


def test_no_match_lists_the_nearest_names():
    with pytest.raises(ValueError) as e:
        tree.match("params/Dense_0/kernell", NAMES)
    assert "Nearest: params/Dense_0/kernel," in str(e.value)
    with pytest.raises(ValueError, match="no layer: there is none to match"):
        tree.match("**", [], what="layer")


def test_one_pattern_of_several_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="'nope'"):
        tree.match(["**/kernel", "nope"], NAMES)


def test_the_first_pattern_that_matches_assigns():
    chosen = tree.assign({"**/Dense_0/kernel": 1, "**/kernel": 2, "**/scale": 3}, NAMES)
    assert chosen == {
        "params/Dense_0/kernel": 1,
        "params/Dense_1/kernel": 2,
        "params/norm/scale": 3,
    }
    with pytest.raises(ValueError, match="Nearest"):
        tree.assign({"**/kernel": 1, "**/kernal": 2}, NAMES)


PATTERNS = ["**", "**/kernel", "params/**", ["**/mean", "**/bias"], "**/norm/*"]


@given(st.sampled_from(PATTERNS))
def test_combine_undoes_partition(pattern):
    train, frozen = tree.partition(PARAMS, pattern)
    both = tree.combine(train, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(PARAMS)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(PARAMS), strict=True)
    )
    assert not {id(x) for x in jax.tree.leaves(train)} & {
        id(x) for x in jax.tree.leaves(frozen)
    }


def test_integers_keys_and_what_is_no_array_never_train():
    params = {
        "w": jnp.ones(2),
        "half": np.ones(2, np.float16),
        "z": jnp.ones(2, jnp.complex64),
        "values": jnp.ones(2, jnp.int8),
        "flag": jnp.array(True),
        "key": jax.random.key(0),
        "name": "text",
        "none": None,
        "field": Everything(jnp.ones(2), {"n": jnp.arange(2)}, None, "t"),
    }
    train, frozen = tree.partition(params)
    assert set(tree.paths(train)) == {"w", "half", "z", "field/array"}
    assert set(tree.paths(frozen)) == {
        "values",
        "flag",
        "key",
        "name",
        "field/nested/n",
    }
    both = tree.combine(train, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    assert both["name"] == "text" and both["none"] is None


def test_only_the_trainable_part_gets_gradients():
    train, frozen = tree.partition(PARAMS, "**/kernel")

    def loss(train):
        params = tree.combine(train, frozen)
        return sum(jnp.sum(x) for x in jax.tree.leaves(params))

    grads = jax.jit(jax.grad(loss))(train)
    assert list(tree.paths(grads)) == [n for n in NAMES if n.endswith("kernel")]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="hold no floating-point array"):
        tree.partition(PARAMS, "**/count")
    with pytest.raises(ValueError, match="Nearest"):
        tree.partition(PARAMS, "**/lora")


def test_split_static_takes_the_arrays_and_leaves_the_rest():
    arrays, fill = tree.split_static({"a": jnp.ones(2), "b": "text", "c": len})
    assert len(arrays) == 1
    filled = fill([3])
    assert filled == {"a": 3, "b": "text", "c": len}


def test_sizes_and_bytes_count_arrays_as_stored():
    params = {
        "a": jnp.ones((2, 3)),
        "b": jnp.ones(5, jnp.int8),
        "c": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16),
        "d": "text",
        "e": jnp.float32(1),
    }
    assert tree.tree_size(params) == 6 + 5 + 10**12 + 1
    assert tree.tree_bytes(params) == 24 + 5 + 2 * 10**12 + 4
    assert tree.tree_size({}) == 0
