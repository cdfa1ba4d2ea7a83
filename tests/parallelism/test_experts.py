import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff.parallelism import audit, make_mesh, Mixed, mixture_of_experts

TOKENS, DIM, EXPERTS = 64, 8, 8


def expert(w, x):
    return jax.nn.relu(x @ w["up"]) @ w["down"]


def problem(seed=0):
    keys = jr.split(jr.key(seed), 4)
    weights = {
        "up": jr.normal(keys[0], (EXPERTS, DIM, 16)) / 3,
        "down": jr.normal(keys[1], (EXPERTS, 16, DIM)) / 4,
    }
    x = jr.normal(keys[2], (TOKENS, DIM))
    return weights, x, x @ jr.normal(keys[3], (DIM, EXPERTS))


def by_hand(weights, x, logits, k):
    """Every expert on every token; of each, the part that its gate lets through."""
    chances = jax.nn.softmax(logits)
    least = jax.lax.top_k(chances, k)[0][:, -1:]
    gates = jnp.where(chances >= least, chances, 0)
    gates = gates / gates.sum(-1, keepdims=True) if k > 1 else gates
    each = jax.vmap(expert, (0, None))(weights, x)
    return jnp.einsum("te,etd->td", gates, each)


def spread(devices, **options):
    mesh = make_mesh(expert=devices, data=1, devices=jax.devices()[:devices])
    run = jax.shard_map(
        lambda w, x, logits: mixture_of_experts(
            expert, w, x, logits, "expert", **options
        ),
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=Mixed(P("expert"), P(), P()),
        check_vma=False,
    )
    return mesh, jax.jit(lambda *of: run(*of))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_with_room_for_all_it_is_every_tokens_experts(devices, k):
    weights, x, logits = problem()
    _, run = spread(devices, k=k, capacity=8.0)
    y, _, dropped = run(weights, x, logits)
    np.testing.assert_allclose(y, by_hand(weights, x, logits, k), atol=1e-5)
    assert dropped == 0
    loss = lambda fn: lambda *of: jnp.sin(fn(*of)).sum()
    got = jax.grad(loss(lambda *of: run(*of)[0]), (0, 1, 2))(weights, x, logits)
    want = jax.grad(loss(lambda *of: by_hand(*of, k)), (0, 1, 2))(weights, x, logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_one_device_needs_no_axis():
    weights, x, logits = problem()
    alone = mixture_of_experts(expert, weights, x, logits, capacity=8.0)
    for a, b in zip(alone, spread(4, capacity=8.0)[1](weights, x, logits), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_expert_takes_first_choices_first_and_leaves_out_what_finds_no_room():
    weights, x, _ = problem()
    # All want expert 0; the first half would have taken expert 1 otherwise.
    logits = jnp.full((TOKENS, EXPERTS), -9.0).at[:, 0].set(5.0).at[:, 1].set(4.0)
    y, _, dropped = mixture_of_experts(expert, weights, x, logits, k=1, capacity=2.0)
    room = 2 * TOKENS // EXPERTS
    gate = jax.nn.softmax(logits[0])[0]
    only = gate * expert(jax.tree.map(lambda a: a[0], weights), x[:room])
    np.testing.assert_allclose(y[:room], only, atol=1e-5)
    assert (y[room:] == 0).all() and dropped == 1 - room / TOKENS
    # As a second choice of the others it comes after: it finds no room at all.
    second = logits.at[0, 1].set(6.0)
    y, *_ = mixture_of_experts(expert, weights, x, second, k=2, capacity=0.25)
    assert (y[1] != 0).any()
    gate = jax.nn.softmax(second[0, :2])[1]
    only = gate * expert(jax.tree.map(lambda a: a[1], weights), x[:1])
    np.testing.assert_allclose(y[:1], only, atol=1e-5)


def test_the_balance_is_one_where_all_get_the_same_and_most_where_one_gets_all():
    weights, x, _ = problem()
    even = 20.0 * jax.nn.one_hot(jnp.arange(TOKENS) % EXPERTS, EXPERTS)
    one = jnp.full((TOKENS, EXPERTS), -20.0).at[:, 3].set(20.0)
    run = spread(4, k=1)[1]
    assert run(weights, x, even).balance == pytest.approx(1, rel=1e-5)
    assert run(weights, x, one).balance == pytest.approx(EXPERTS, rel=1e-5)


def test_tokens_go_to_their_experts_and_back_and_nothing_else_is_sent():
    n, (weights, x, logits) = 4, problem()
    mesh, run = spread(n, k=2, capacity=1.0)
    found = audit(run.lower(weights, x, logits).compile(), mesh)
    slots = EXPERTS * (2 * TOKENS // n // EXPERTS) * DIM * 4
    assert found.of("all-to-all", "expert").bytes == 2 * slots
    # The means of the balance, and of what was dropped.
    assert found.of("all-reduce").bytes == (2 * EXPERTS + 1) * 4


@pytest.mark.parametrize("k", [1, 2])
def test_the_router_learns_from_what_its_choices_are_worth(k):
    weights, x, logits = problem()
    y = lambda logits: mixture_of_experts(expert, weights, x, logits, k=k).y.sum()
    assert np.abs(jax.grad(y)(logits)).max() > 1e-3


def test_half_precision_stays_half():
    weights, x, logits = problem()
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    y, balance, _ = mixture_of_experts(expert, half(weights), half(x), logits)
    assert y.dtype == jnp.bfloat16 and balance.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "got k=0"),
        ({"k": 9}, "1 to 8 experts, .* got k=9"),
        ({"capacity": 0.0}, "capacity=0.0"),
        ({"capacity": math.nan}, "finite capacity above 0, got .* capacity=nan"),
    ],
)
def test_numbers_out_of_range_are_an_error(change, said):
    with pytest.raises(ValueError, match=said):
        mixture_of_experts(expert, *problem(), **change)


@pytest.mark.parametrize(("tokens", "rows"), [(5, 6), (1, 6), (0, 0)])
def test_tokens_without_logits_are_an_error(tokens, rows):
    weights, x, logits = problem()
    with pytest.raises(ValueError, match=f"are {tokens} tokens and {rows} rows"):
        mixture_of_experts(expert, weights, x[:tokens], logits[:rows])


def test_experts_that_are_not_there_are_an_error():
    weights, x, logits = problem()
    few = jax.tree.map(lambda a: a[:6], weights)
    with pytest.raises(ValueError, match=r"8 experts, shared by 1 .* for \[6\]"):
        mixture_of_experts(expert, few, x, logits)
