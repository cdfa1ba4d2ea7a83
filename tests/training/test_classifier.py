"""The loss of a Linen classifier, and the two forms of its model."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from jaxeff.data import Batch
from jaxeff.distillation import response_loss, taught
from jaxeff.models import CNN, MLP
from jaxeff.program import like
from jaxeff.pruning import shrink
from jaxeff.training import (
    classification_loss,
    classifier,
    forms,
    init_state,
    make_train_step,
)

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_loss_is_the_cross_entropy_of_the_training_form[model0]",
}


def batch(key, n=8):
    images, labels = jr.split(key)
    return Batch(jr.normal(images, (n, 8, 8, 1)), jr.randint(labels, (n,), 0, 10))


@pytest.mark.parametrize("model", [MLP(features=(8,)), CNN(stages=((4,), (4,)))])
def test_the_loss_is_the_cross_entropy_of_the_training_form(model, getkey):
    data = batch(getkey())
    variables = model.init(getkey(), data.images)
    _, train_fn = forms(model, variables)
    loss, aux = classification_loss(train_fn)(variables, data, getkey())
    logits, updates = train_fn(variables, data.images)
    nats = -jax.nn.log_softmax(logits)[jnp.arange(8), data.labels]
    assert jnp.allclose(loss, nats.mean(), rtol=1e-5)
    assert aux.updates.keys() == updates.keys() == variables.keys() - {"params"}


def test_evaluation_does_not_see_the_batch_and_training_does(getkey):
    model, data = CNN(stages=((4,), (4,))), batch(getkey())
    variables = model.init(getkey(), data.images)
    eval_fn, train_fn = forms(model, variables)
    one, all_of_them = (
        eval_fn(variables, data.images[:1]),
        eval_fn(variables, data.images),
    )
    assert jnp.allclose(one, all_of_them[:1], atol=1e-5)
    one, all_of_them = (
        train_fn(variables, x)[0] for x in (data.images[:1], data.images)
    )
    assert not jnp.allclose(one, all_of_them[:1], atol=1e-2)


def test_augmentation_is_what_the_teacher_sees_too(getkey):
    model, data = MLP(features=(8,)), batch(getkey())
    variables = model.init(getkey(), data.images)
    _, train_fn = forms(model, variables)
    forward = classifier(train_fn, augment=lambda key, x: x + jr.normal(key, x.shape))
    answer = forward(variables, data, getkey())
    assert not jnp.array_equal(answer.inputs[0], data.images)
    assert jnp.allclose(train_fn(variables, answer.inputs[0])[0], answer.logits)


def test_a_shrunk_student_with_batch_norm_learns_from_its_dense_teacher(getkey):
    model, data = CNN(stages=((8,), (8,))), batch(getkey(), 32)
    variables = model.init(getkey(), data.images)
    eval_fn, train_fn = forms(model, variables)
    small_fn, small = shrink(eval_fn, variables, data.images[:1])
    forward = classifier(like(small_fn, train_fn))
    loss = response_loss(forward, eval_fn, temperature=2.0, weight=1.0)
    tx = optax.adam(1e-2)
    state = init_state(small, tx, getkey(), trainable="params/**")
    step = taught(make_train_step(loss, tx, trainable="params/**"), variables)
    losses = []
    for _ in range(30):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    old = jax.tree.leaves(small["batch_stats"])
    new = jax.tree.leaves(state.params["batch_stats"])
    assert not any(map(jnp.array_equal, old, new))
