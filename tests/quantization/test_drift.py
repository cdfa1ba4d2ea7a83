"""Weights that make up for the rounding of those before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.program import calibrate, dense
from jaxeff.quantization import adaround, gptq, int2, int3, int8
from jaxeff.quantization.drift import grams, undrifted
from tests.quantization.problems import problem

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_deep_model_is_nearer_to_what_it_was[gptq]",
}


def test_without_drift_nothing_changes():
    w, x = problem()
    h, mixed = grams(x[None], x[None])
    np.testing.assert_array_equal(undrifted(w[None], h, mixed, 0.01)[0], w)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_outputs_come_nearer_to_those_that_were(damping):
    w, before = problem()
    rng = np.random.default_rng(1)
    x = before + 0.3 * rng.normal(size=before.shape) + 0.1 * before[:, ::-1]
    x = jnp.asarray(x, jnp.float32)
    h, mixed = grams(x[None], before[None])
    new = undrifted(w[None], h, mixed, damping)[0]
    off = lambda v: float(jnp.linalg.norm(before @ w.T - x @ v.T))
    assert off(new) < off(w)
    best = np.linalg.lstsq(np.asarray(x), np.asarray(before @ w.T), rcond=None)[0].T
    assert off(jnp.asarray(best)) <= off(new) * 1.0001
    if damping == 1e-6:
        np.testing.assert_allclose(new, best, atol=2e-3)


def test_what_no_data_tell_of_stays():
    w, x = problem()
    x = x.at[:, 5:9].set(0)
    h, mixed = grams(x[None], 1.1 * x[None])
    new = undrifted(w[None], h, mixed, 0.01)[0]
    np.testing.assert_allclose(new[:, 5:9], w[:, 5:9], atol=1e-5)
    nothing = jnp.zeros_like(h)
    np.testing.assert_array_equal(undrifted(w[None], nothing, nothing, 0.01)[0], w)


def deep(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) + x / 2, None), x, params["w"])[0]


def test_the_inputs_that_were_are_those_of_the_model_as_it_was():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 6, 6)) / 3, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(10, 6)), jnp.float32)
    seen = []

    def look(part, w, total):
        seen.append(total)
        return jnp.zeros_like(w)  # as different as can be

    new = calibrate(
        deep, params, [(x[:5],), (x[5:],)], weights=["w"], compare=params,
        statistic=lambda now, then: (now.sum((0, 1)), then.sum((0, 1))), update=look,
    )  # fmt: skip
    np.testing.assert_array_equal(new["w"], 0)
    now = then = x
    for layer, (a, b) in enumerate(seen):
        np.testing.assert_allclose(a, now.sum(0), atol=1e-5)
        np.testing.assert_allclose(b, then.sum(0), atol=1e-5)
        now, then = now / 2, deep({"w": params["w"][layer : layer + 1]}, then)


def test_what_is_rounded_before_any_data_counts_too():
    """The rows of a table, of which no data tells, are rounded first."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    params = {"table": draw(50, 40), "w": draw(40, 24)}
    look = lambda p, ids: p["table"][ids] @ p["w"]
    ids, off = jnp.arange(50), []
    for drift in (False, True):
        formats = {"table": int2, "w": int8}
        _, q = gptq(look, params, ids, batches=[(ids,)], formats=formats, drift=drift)
        y = dense(q)["table"] @ dense(q)["w"]
        off.append(float(jnp.linalg.norm(y - look(params, ids))))
    assert off[1] < 0.9 * off[0]


@pytest.mark.parametrize(
    "method", [gptq, pytest.param(adaround, marks=pytest.mark.slow)]
)
def test_a_deep_model_is_nearer_to_what_it_was(method):
    ratios = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        params = {"w": jnp.asarray(rng.normal(size=(6, 40, 40)) / 8, jnp.float32)}
        x = problem(seed=seed, n=600)[1]
        given = {"batches": [(x[:400],)], "formats": int3}
        y, off = deep(params, x[400:]), []
        for drift in (False, True):
            fn, q = method(deep, params, x[:400], drift=drift, **given)
            off.append(float(jnp.linalg.norm(fn(q, x[400:]) - y)))
        ratios.append(off[1] / off[0])
    assert np.mean(ratios) < 0.97
