import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jaxeff.models import GPT


def test_a_sequence_beyond_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="max_len=8, got 9 tokens"):
        GPT(max_len=8).init(jr.key(0), jnp.zeros((1, 9), int))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="3 heads for 16"):
        GPT(d_model=16, n_heads=3).init(jr.key(0), jnp.zeros((1, 2), int))


def test_parameters_are_those_of_gpt2_small(getkey):
    # 124,439,808 are published for 12 layers of 768, 50,257 tokens, 1,024 positions.
    model = GPT(50_257, 1024, d_model=768, n_layers=12, n_heads=12)
    shapes = jax.eval_shape(model.init, getkey(), jnp.zeros((1, 2), int))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
