"""Response distillation: a student learns the teacher's softened answers.

The teacher is any `fn, params`: another architecture, an ensemble, the dense
model that the student was shrunk from. Its parameters enter the step as an
argument beside the batch, so they are neither copied into the compiled program
nor part of the student's state and checkpoints:

    loss = response_loss(forward, teacher_fn, temperature=4.0)
    step = taught(make_train_step(loss, tx), teacher_params)
    state, metrics = step(state, batch)

Source: Hinton et al. 2015, arXiv:1503.02531.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Answer(NamedTuple):
    """What a student made of a batch.

    Attributes:
        logits: unnormalised log-probabilities.
        inputs: what the teacher is to be asked, `teacher_fn(params, *inputs)`:
            the student's own inputs, after augmentation.
        loss: of the task itself, averaged over the batch, in nats.
        aux: whatever the training step wants beside the loss.
    """

    logits: Float[Array, "*batch classes"]
    inputs: tuple[Any, ...]
    loss: Float[Array, ""]
    aux: Any


Forward = Callable[[PyTree, Any, Array], Answer]


def distill_loss(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "*batch classes"],
    *,
    temperature: float | int,
) -> Float[Array, "*batch"]:
    """KL(teacher || student) of the softened distributions, times temperature².

    The square keeps the gradient's size nearly independent of temperature, so it
    can be tuned apart from the learning rate.

    Args:
        student, teacher: logits. No gradient flows into `teacher`.
        temperature: > 0. 1 leaves the logits as they are; larger is softer.

    Returns:
        Nats per example, not averaged; float32 at least.

    Raises:
        ValueError: `temperature` is not positive, or the shapes differ.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}: 1 is plain.")
    _check_same(teacher.shape, student.shape)
    wide = jnp.promote_types(jnp.float32, jnp.result_type(student, teacher))
    soften = lambda x: jax.nn.log_softmax(x.astype(wide) / temperature)
    log_p, log_q = soften(jax.lax.stop_gradient(teacher)), soften(student)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _check_same(teacher: tuple[int, ...], student: tuple[int, ...]) -> None:
    if teacher != student:
        raise ValueError(
            f"teacher and student answer the same question, but their logits have "
            f"shapes {teacher} and {student}. Choose models with the same classes."
        )


def response_loss(
    forward: Forward,
    teacher_fn: Callable[..., Array],
    *,
    temperature: float | int = 4.0,
    weight: float | int = 0.9,
) -> Callable[[PyTree, Any, Array], tuple[Array, Any]]:
    """`weight` parts of the teacher's answers and the rest of the labels.

    Args:
        forward: `forward(params, batch, key) -> Answer` of the student.
        teacher_fn: `teacher_fn(teacher_params, *inputs) -> logits`, as evaluated.
        temperature: see `distill_loss`.
        weight: of the teacher, in [0, 1].

    Returns:
        `loss(params, (batch, teacher_params), key) -> (scalar, aux)` for a training
        step; see `taught`.

    Raises:
        ValueError: `weight` is outside [0, 1]; while tracing, `temperature` is not
            positive or the two disagree about the shape of their logits.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is the teacher's share, in [0, 1], got {weight}.")

    def loss(params, batch_and_teacher, key):
        batch, teacher_params = batch_and_teacher
        answer = forward(params, batch, key)
        teacher = teacher_fn(teacher_params, *answer.inputs)
        _check_same(teacher.shape, answer.logits.shape)
        soft = distill_loss(answer.logits, teacher, temperature=temperature)
        return weight * jnp.mean(soft) + (1 - weight) * answer.loss, answer.aux

    return loss


def taught(step: Callable[[Any, Any], Any], teacher_params: PyTree) -> Callable:
    """A step of `response_loss` as one of `(state, batch)` alone."""
    return lambda state, batch: step(state, (batch, teacher_params))
