import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from flax import linen as nn
from hypothesis import given, strategies as st

from jaxeff import models
from jaxeff.data import Batch
from jaxeff.distillation import Answer, distill_loss, response_loss, taught
from jaxeff.program import lift
from jaxeff.training import (
    Aux,
    classification_loss,
    classifier,
    forms,
    init_state,
    make_train_step,
)

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_a_student_with_batch_norm_learns_from_a_teacher_without_labels",
}

TEMPERATURES = [0.5, 1, 4.0, 20.0]


def logits(key, *shape, scale=3.0):
    return scale * jr.normal(key, shape)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    temperature, getkey
):
    z = logits(getkey(), 6, 5)
    loss = lambda s: jnp.sum(distill_loss(s, z, temperature=temperature))
    assert jnp.abs(loss(z)) < 1e-5
    assert jnp.max(jnp.abs(jax.grad(loss)(z))) < 1e-5 * temperature


@given(seed=st.integers(0, 99), temperature=st.floats(0.3, 30), shift=st.floats(-9, 9))
def test_it_is_never_negative_and_ignores_a_constant(seed, temperature, shift):
    k1, k2 = jr.split(jr.key(seed))
    s, t = logits(k1, 4, 5), logits(k2, 4, 5)
    nats = distill_loss(s, t, temperature=temperature)
    assert nats.shape == (4,)
    assert jnp.all(nats >= -1e-5 * temperature**2)
    moved = distill_loss(s + shift, t - shift, temperature=temperature)
    assert jnp.allclose(nats, moved, rtol=1e-3, atol=1e-4 * temperature**2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_its_gradient_is_temperature_times_the_difference_of_probabilities(
    temperature, getkey
):
    """Hinton et al., equation 2, times T squared."""
    s, t = logits(getkey(), 5), logits(getkey(), 5)
    grad = jax.grad(lambda s: distill_loss(s, t, temperature=temperature))(s)
    p, q = jax.nn.softmax(t / temperature), jax.nn.softmax(s / temperature)
    assert jnp.allclose(grad, temperature * (q - p), rtol=1e-4, atol=1e-5)


def test_when_very_soft_it_matches_logits(getkey):
    """Equation 4: the gradient tends to the difference of centred logits over N."""
    s, t = logits(getkey(), 8, 5), logits(getkey(), 8, 5)
    centred = lambda z: z - jnp.mean(z, axis=-1, keepdims=True)
    limit = (centred(s) - centred(t)) / 5

    def distance(temperature):
        loss = lambda s: jnp.sum(distill_loss(s, t, temperature=temperature))
        return float(jnp.linalg.norm(jax.grad(loss)(s) - limit))

    assert distance(200.0) < 0.02 * float(jnp.linalg.norm(limit))
    # The error falls as 1 / T.
    assert distance(100.0) == pytest.approx(10 * distance(1000.0), rel=0.25)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_is_the_kl_divergence_times_temperature_squared(temperature, getkey):
    s, t = logits(getkey(), 7, 5), logits(getkey(), 7, 5)
    soft = lambda z: jax.nn.softmax(z / temperature)
    kl = optax.kl_divergence(jnp.log(soft(s)), soft(t))
    nats = distill_loss(s, t, temperature=temperature)
    assert jnp.allclose(nats, temperature**2 * kl, rtol=1e-3, atol=1e-4)


def test_no_gradient_flows_into_the_teacher(getkey):
    s, t = logits(getkey(), 3, 5), logits(getkey(), 3, 5)
    loss = lambda s, t: jnp.sum(distill_loss(s, t, temperature=2.0))
    assert jnp.all(jax.grad(loss, argnums=1)(s, t) == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logits_in_low_precision_are_summed_in_float32(dtype, getkey):
    s, t = logits(getkey(), 4, 1000).astype(dtype), logits(getkey(), 4, 1000, scale=5.0)
    nats = distill_loss(s, t.astype(dtype), temperature=1.0)
    assert nats.dtype == jnp.float32
    exact = distill_loss(
        s.astype(jnp.float32), t.astype(dtype).astype(jnp.float32), temperature=1.0
    )
    assert jnp.array_equal(nats, exact)


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        distill_loss(jnp.ones(3), jnp.ones(3), temperature=temperature)


# The loss of a training step.


def linear(params, x):
    return x @ params["w"]


def forward(params, batch, key):
    x, labels = batch
    out = linear(params, x)
    nats = optax.softmax_cross_entropy_with_integer_labels(out, labels)
    return Answer(out, (x,), jnp.mean(nats), Aux({"seen": jnp.float32(len(x))}))


def problem(key):
    k1, k2, k3, k4 = jr.split(key, 4)
    x = jr.normal(k1, (32, 6))
    batch = (x, jr.randint(k2, (32,), 0, 4))
    return {"w": jr.normal(k3, (6, 4))}, {"w": jr.normal(k4, (6, 4))}, batch


@given(weight=st.floats(0, 1))
def test_the_loss_mixes_teacher_and_labels_by_weight(weight):
    student, teacher, batch = problem(jr.key(0))
    loss = response_loss(forward, linear, temperature=3.0, weight=weight)
    value, aux = loss(student, (batch, teacher), jr.key(1))
    soft = distill_loss(
        linear(student, batch[0]), linear(teacher, batch[0]), temperature=3.0
    )
    hard = forward(student, batch, jr.key(1)).loss
    assert jnp.allclose(value, weight * jnp.mean(soft) + (1 - weight) * hard)
    assert aux.metrics["seen"] == 32


def test_the_teacher_is_a_constant_whatever_its_weight_in_the_step(getkey):
    student, teacher, batch = problem(getkey())
    loss = response_loss(forward, linear, temperature=2.0, weight=0.5)
    run = lambda t: loss(student, (batch, t), jr.key(0))[0]
    assert jnp.all(jax.grad(run)(teacher)["w"] == 0)


def test_any_function_may_teach(getkey):
    """A lifted one, one of another architecture, an ensemble."""
    student, teacher, batch = problem(getkey())
    two = (teacher, {"w": jr.normal(getkey(), (6, 4))})
    ensemble = lambda ps, x: (linear(ps[0], x) + linear(ps[1], x)) / 2
    deep = nn.Sequential([nn.Dense(9), nn.relu, nn.Dense(4)])
    variables = deep.init(getkey(), batch[0])
    for fn, params in [
        (lift(linear), teacher),
        (ensemble, two),
        (deep.apply, variables),
    ]:
        loss = response_loss(forward, fn)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(
            student, (batch, params), jr.key(0)
        )
        assert value > 0 and jnp.any(grads["w"] != 0)


def test_teacher_and_student_must_answer_the_same_question(getkey):
    student, _, batch = problem(getkey())
    loss = response_loss(forward, linear)
    with pytest.raises(ValueError, match=r"\(32, 3\) and \(32, 4\).*the same classes"):
        loss(student, (batch, {"w": jnp.ones((6, 3))}), jr.key(0))


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ValueError, match=rf"in \[0, 1\], got {weight}"):
        response_loss(forward, linear, weight=weight)


class Normed(nn.Module):
    """A student that changes its statistics while it trains."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(24)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(4)(nn.relu(x))


def test_a_student_with_batch_norm_learns_from_a_teacher_without_labels(getkey):
    """Whole steps: the student nears the teacher; statistics move; labels are noise."""
    k1, k2 = getkey(), getkey()
    x = jr.normal(getkey(), (64, 3, 3, 1))
    teacher = models.MLP(features=(16,), classes=4)
    student = Normed()
    teacher_params = teacher.init(k1, x)
    # A teacher with opinions: its first logits are all near zero.
    teacher_params = jax.tree.map(lambda w: 3 * w, teacher_params)
    variables = student.init(k2, x)
    eval_fn, train_fn = forms(student, variables)
    labels = jr.randint(getkey(), (64,), 0, 4)
    batch = Batch(images=x, labels=labels)
    answers = jnp.argmax(teacher.apply(teacher_params, x), axis=-1)
    agree = lambda params: jnp.mean(jnp.argmax(eval_fn(params, x), -1) == answers)

    loss = response_loss(classifier(train_fn), teacher.apply, temperature=2.0, weight=1)
    tx = optax.adam(2e-2)
    options = {"trainable": "params/**"}
    step = taught(make_train_step(loss, tx, **options), teacher_params)
    state = init_state(variables, tx, jr.key(0), **options)
    values = []
    for _ in range(60):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.3 * values[0]
    assert agree(state.params) > agree(variables) + 0.2
    moved = jax.tree.map(
        lambda a, b: not jnp.array_equal(a, b),
        state.params["batch_stats"],
        variables["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))
    # The same step without a teacher is that of the labels alone.
    alone = response_loss(classifier(train_fn), teacher.apply, weight=0)
    hard, _ = classification_loss(train_fn)(variables, batch, jr.key(0))
    mixed, _ = alone(variables, (batch, teacher_params), jr.key(0))
    assert jnp.allclose(hard, mixed)


@pytest.mark.parametrize("teacher", [(2, 4), (2, 1), (3,)])
def test_logits_of_different_classes_are_one_clear_line(teacher):
    loss = inspect.unwrap(distill_loss)
    with pytest.raises(ValueError, match="same question.*Choose models"):
        loss(jnp.ones((2, 3)), jnp.ones(teacher), temperature=2)
