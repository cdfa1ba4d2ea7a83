"""How much each index matters to what the function puts out, without gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import Coupling, Program

from .scores import Score, Scores


def output_error(batches: Iterable[tuple]) -> Score:
    """The relative squared change of the outputs if one index leaves, measured.

    The function runs once for each index of each coupling and each batch, so a few
    examples have to do. It is exact for one index; that several leave together it
    does not see.

    Args:
        batches: tuples of arrays, the arguments after the weights.

    Source: the removal score of Molchanov et al. 2017, arXiv:1611.06440, section 2.2
    ("oracle"), with the outputs in the place of the loss.
    """

    def score(program: Program, params: PyTree) -> Scores:
        given = list(batches)
        if not given:
            raise ValueError(
                "a score by outputs needs at least one batch, but there is none (an "
                "iterator is used up after one pass). Give a list of tuples of arrays."
            )
        fn = program.call.fn
        dense = [jax.jit(fn)(params, *batch) for batch in given]
        out = {}
        for coupling in program.couplings.free:
            errors = _errors(fn, program, coupling)
            out[coupling.name] = np.mean(
                [errors(params, *pair) for pair in zip(given, dense, strict=True)], 0
            )
        return out

    return score


def _errors(
    fn: Callable, program: Program, coupling: Coupling
) -> Callable[[PyTree, tuple, Any], Float[Array, " size"]]:
    """(weights, arguments, dense outputs) -> the error without each index."""
    at = {
        path: [
            (d, index)
            for d in range(len(program.couplings.dims[path]))
            for name, index in program.couplings.occurrences(path, d)
            if name == coupling.name
        ]
        for path, _ in coupling.members
    }

    def without(params: PyTree, i: Array) -> PyTree:
        def zero(keypath, w):
            for d, index in at.get(tree.path_name(keypath), ()):
                others = [k for k in range(w.ndim) if k != d]
                w = jnp.where(jnp.expand_dims(jnp.asarray(index) == i, others), 0, w)
            return w

        return jax.tree_util.tree_map_with_path(zero, params)

    @jax.jit
    def errors(params, args, dense):
        error = lambda i: _distance(fn(without(params, i), *args), dense)
        return jax.lax.map(error, jnp.arange(coupling.size))

    return errors


def _distance(a: PyTree, b: PyTree) -> Array:
    """The squared distance of two results, in units of the squared norm of `b`."""
    pairs = [
        (x.astype(jnp.float32), y.astype(jnp.float32))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    off = sum(jnp.sum((x - y) ** 2) for x, y in pairs)
    return off / jnp.maximum(sum(jnp.sum(y**2) for _, y in pairs), 1e-30)
