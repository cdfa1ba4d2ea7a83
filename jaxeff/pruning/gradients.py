"""How much each index matters to a loss, from gradients on data.

To remove an index is to set what consumes it, its rows in the kernels after it, to
zero; the scores expand the loss around the weights in that step.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxeff import tree
from jaxeff.program import Program

from .scores import arguments, consumed, Score, Scores

Loss = Callable[..., Array]


def taylor(loss: Loss, batches: Iterable[tuple]) -> Score:
    """The squared first-order change of the loss if an index leaves.

    Per batch the sum of w * dL/dw over the index's weights, squared; then the mean
    over the batches.

    Args:
        loss: `loss(params, *batch) -> scalar`, the mean over a batch.
        batches: tuples of arrays; gone through once.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equations 7 and 8, for groups.
    """

    def score(program: Program, params: PyTree) -> Scores:
        totals, n = {}, 0
        for products in _each_batch(loss, batches, params, _change):
            sums = consumed(program, products)
            totals = {k: totals.get(k, 0) + x**2 for k, x in sums.items()}
            n += 1
        return {k: x / n for k, x in totals.items()}

    return score


def fisher(loss: Loss, batches: Iterable[tuple]) -> Score:
    """The second-order change of the loss, its Hessian taken to be diagonal.

    Half of w^2 times the mean of (dL/dw)^2 over the batches, the empirical Fisher
    information, summed over the index's weights. A batch of one example each gives
    the Fisher information itself, larger ones an estimate that is smaller by their
    size.

    Args:
        loss: `loss(params, *batch) -> scalar`.
        batches: tuples of arrays; gone through once.

    Source: LeCun et al. 1989 (optimal brain damage), equation 5, with the Fisher
    information of Theis et al. 2018, arXiv:1801.05787, for the Hessian's diagonal.
    """

    def score(program: Program, params: PyTree) -> Scores:
        total: dict[str, Array] = {}
        n = 0
        squared = lambda w, g: _change(w, g) ** 2
        for squares in _each_batch(loss, batches, params, squared):
            total = {k: total.get(k, 0) + x for k, x in squares.items()}
            n += 1
        return consumed(program, {k: x / (2 * n) for k, x in total.items()})

    return score


def _change(w: Array, grad: Array) -> Array:
    """Of the loss per change of a weight, relative to the weight."""
    # Of complex weights JAX's gradient is what multiplies a step, not its conjugate.
    return jnp.real(w * grad)


def _each_batch(
    loss: Loss, batches: Iterable[tuple], params: PyTree, combine: Callable
) -> Iterator[dict[str, Array]]:
    """For each batch, `combine(weight, gradient)` of every weight, by path."""
    train, frozen = tree.partition(params)

    @jax.jit
    def run(train: PyTree, frozen: PyTree, batch: tuple) -> PyTree:
        objective = lambda train: loss(tree.combine(train, frozen), *batch)
        grads = jax.grad(objective)(train)
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jax.tree.map(lambda w, g: combine(wide(w), wide(g)), train, grads)

    empty = True
    for batch in batches:
        empty = False
        yield tree.paths(run(train, frozen, arguments(batch)))
    if empty:
        raise ValueError(
            "a score by gradients needs at least one batch, but there is none (an "
            "iterator is used up after one pass). Give a list of tuples of arrays."
        )
