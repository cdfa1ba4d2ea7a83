"""How much each index matters to what the function computes, without gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import (
    calibrate,
    change_parts,
    Coupling,
    find_uses,
    Part,
    Program,
    squares,
)

from .scores import arguments, consumed, consumers, Score, Scores


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
        given, fn = checked(batches), program.call.fn
        dense = [jax.jit(fn)(params, *batch) for batch in given]
        out = {}
        for coupling in program.couplings.free:
            errors = _errors(fn, program, coupling)
            out[coupling.name] = np.mean(
                [errors(params, *pair) for pair in zip(given, dense, strict=True)], 0
            )
        return out

    return score


def activation(batches: Iterable[tuple]) -> Score:
    """The mean squared size of what an index carries into the weights that consume it.

    The function runs once for each batch. A coupling that no weight consumes, as that
    of the query and key dims of an attention, is not judged; nor one whose consumers
    calibration cannot see (inside a `while`).

    Args:
        batches: tuples of arrays, the arguments after the weights.

    Source: the mean activation of Molchanov et al. 2017, arXiv:1611.06440, section
        2.2, squared.
    """

    def score(program: Program, params: PyTree) -> Scores:
        given, fn = checked(batches), program.call.fn
        uses = find_uses(fn, params, given[0])
        names = dict.fromkeys(path for path, _ in consumers(program))
        weights = [p for p in names if not uses.candidates[p].reason]
        totals: dict[Part, Array] = {}
        examples = sum(len(jax.tree.leaves(batch)[0]) for batch in given)

        def record(part, w, total):
            totals[part] = total / (examples * part.rows)
            return w

        options: dict[str, Any] = {"weights": weights, "progress": False}
        calibrate(fn, params, given, statistic=squares, update=record, **options)
        # Each element as large as what its input carries, shared by the outputs.
        sizes = change_parts(
            fn,
            params,
            *given[0],
            weights=weights,
            update=lambda part, w: jnp.broadcast_to(totals[part][:, None], w.shape),
        )
        every = tree.paths(sizes)
        found = consumed(program, {path: every[path] for path in weights})
        judged = {
            name
            for path, d in consumers(program)
            if path in weights
            for name, _ in program.couplings.occurrences(path, d)
        }
        return {name: x for name, x in found.items() if name in judged}

    return score


def checked(batches: Iterable[tuple]) -> list[tuple]:
    """The batches as a list, if there are any."""
    given = [arguments(batch) for batch in batches]
    if not given:
        raise ValueError(
            "a score by outputs needs at least one batch, but there is none (an "
            "iterator is used up after one pass). Give a list of tuples of arrays."
        )
    return given


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
        error = lambda i: relative_error(fn(without(params, i), *args), dense)
        return jax.lax.map(error, jnp.arange(coupling.size))

    return errors


def relative_error(a: PyTree, b: PyTree) -> Array:
    """The squared distance of two results, in units of the squared norm of `b`."""
    wide = lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    a, b = jax.tree.map(wide, (a, b))
    off = jax.tree.map(lambda x, y: x - y, a, b)
    norm = lambda t: sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(t))
    return norm(off) / jnp.maximum(norm(b), 1e-30)
