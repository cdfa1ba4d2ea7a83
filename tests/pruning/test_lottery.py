import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.pruning import (
    fix_masks,
    global_ranking,
    lottery_tickets,
    masked,
    one_shot,
    periodic,
    Ticket,
)
from jaxeff.training import load_params, save_params

ROUNDS = 4
SCHEDULE = periodic(0.3, begin=0, every=1, times=ROUNDS)


def make_train(x, y, seen=None):
    """Trains two layers on a regression with the masks held."""

    def loss(params):
        h = jnp.tanh(x @ params["up"] + params["bias"][None])
        return jnp.mean(jnp.square(h @ params["down"] - y))

    @jax.jit
    def train(params, masks):
        tx = optax.chain(optax.adam(1e-2), fix_masks(masks))
        state = tx.init(params)

        def turn(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(turn, (params, state), length=20)[0][0]

    def noted(params, masks):
        if seen is not None:
            seen.append((params, masks))
        return train(params, masks)

    return noted


@pytest.fixture
def case(normal):
    params = {"up": normal(6, 10), "bias": normal(10), "down": normal(10, 3)}
    return normal(32, 6), normal(32, 3), params


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def test_every_round_starts_from_the_early_weights_that_remain(case):
    x, y, params = case
    seen, masks = [], None
    tickets = list(
        lottery_tickets(make_train(x, y, seen), params, SCHEDULE, rounds=ROUNDS)
    )
    assert [int(t.round) for t in tickets] == [1, 2, 3, 4]
    assert equal(seen[0][0], params)
    for k, ticket in enumerate(tickets):
        for name in ("up", "down"):
            mask, w = np.asarray(ticket.masks[name]), np.asarray(ticket.trained[name])
            dropped = np.round(np.float32(1 - 0.7 ** (k + 1)) * np.float32(w.size))
            assert (~mask).sum() == dropped
            # Of what was left, the smallest trained weights go.
            assert np.abs(w)[mask].min() >= np.abs(w)[~mask].max()
            assert np.array_equal(ticket.params[name], np.where(mask, params[name], 0))
            assert masks is None or not np.any(mask & ~np.asarray(masks[name]))
        assert ticket.masks["bias"] is None
        assert np.array_equal(ticket.params["bias"], params["bias"])
        if k + 1 < ROUNDS:
            assert equal(seen[k + 1], (ticket.params, ticket.masks))
        masks = ticket.masks


@pytest.mark.parametrize("rewind", [True, False])
def test_a_run_goes_on_from_a_stored_ticket_as_if_never_stopped(case, rewind, tmp_path):
    x, y, params = case
    train = make_train(x, y)
    options = {"rounds": ROUNDS, "distribution": global_ranking, "rewind": rewind}
    whole = list(lottery_tickets(train, params, SCHEDULE, **options))
    first = next(lottery_tickets(train, params, SCHEDULE, **options))
    save_params(tmp_path / "ticket", first)
    again, _ = load_params(tmp_path / "ticket", jax.eval_shape(lambda: first))
    assert isinstance(again, Ticket)
    rest = list(lottery_tickets(train, params, SCHEDULE, start=again, **options))
    assert len(rest) == ROUNDS - 1
    assert all(equal(a, b) for a, b in zip(rest, whole[1:], strict=True))
    ends = [w for w in jax.tree.leaves(masked_trained(whole[-1]))]
    starts = jax.tree.leaves(whole[-1].params)
    assert equal(ends, starts) == (not rewind)


def masked_trained(ticket):
    state = fix_masks(ticket.masks).init(ticket.trained)
    return masked(ticket.trained, state)


def test_training_that_revives_dropped_weights_is_refused(case):
    _, _, params = case
    tickets = lottery_tickets(
        lambda p, m: jax.tree.map(lambda x: x + 1, p), params, SCHEDULE, rounds=2
    )
    next(tickets)
    with pytest.raises(ValueError, match=r"9 of down are not.*fix_masks"):
        next(tickets)
    with pytest.raises(ValueError, match="Return the parameters alone"):
        next(lottery_tickets(lambda p, m: (p, m), params, SCHEDULE, rounds=2))
    with pytest.raises(ValueError, match="rounds counts steps"):
        next(lottery_tickets(make_train(*case[:2]), params, one_shot(0.5), rounds=0))
    with pytest.raises(ValueError, match="nothing to prune"):
        next(lottery_tickets(lambda p, m: p, {"b": params["bias"]}, SCHEDULE, rounds=1))
