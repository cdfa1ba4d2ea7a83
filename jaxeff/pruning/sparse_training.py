"""Penalties that make whole channels, or the scales of norms, small while training.

What is small costs little when it is removed afterwards. Each is a gradient
transformation that adds the gradient of its penalty: place it first in a chain.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxeff import tree
from jaxeff.program import owners, Program


class _Member(NamedTuple):
    """A dim of a weight that a coupling is part of."""

    path: str
    dim: int
    index: Int[np.ndarray, " _"]  # of the coupling, for each index of the dim; -1: none


def group_lasso(
    program: Program, strength: float, *, only: tree.Patterns = "**"
) -> optax.GradientTransformation:
    """Pulls the channels, neurons and heads of a model to zero, each as a whole.

    The penalty is strength * sum over couplings and their indices of
    sqrt(n) * ||w||, where w are the n numbers of the multiplying weights that leave
    with an index: what `shrink` would take.

    Args:
        program: `trace(fn, params, *args)`; the weights that train may be a part of
            its own (`variables["params"]`).
        strength: of the penalty, in units of the loss.
        only: patterns of weights; a coupling counts if all its multiplying weights
            match.

    Raises:
        ValueError: a pattern matches no weight, or no coupling is left to penalise;
            at `update`, where it is called without params, or a weight is missing.

    Source: Wen et al. 2016 (structured sparsity learning), arXiv:1608.03665, equation
        3; the factor sqrt(n) of Yuan & Lin 2006.
    """
    groups = _groups(program, only)
    paths = {m.path for members in groups.values() for m in members}

    def update(updates, state, params=None):
        given = _weights("group_lasso", params)
        fits = lambda name, path: given[name].shape == program.shapes[path].shape
        names = {
            found[0]: name
            for name, found in owners(given, program.shapes, fits).items()
            if len(found) == 1
        }
        if missing := sorted(paths - names.keys()):
            raise ValueError(
                f"group_lasso penalises {missing[0]}, which is not among the "
                f"{len(given)} weights that train. Leave it out by `only`."
            )
        weights = {path: given[name] for path, name in names.items()}
        extra: dict[str, Any] = {}
        for members in groups.values():
            for path, grad in _penalty_grads(members, weights).items():
                name = names[path]
                extra[name] = extra.get(name, 0) + strength * grad
        return _add(updates, extra), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def l1(strength: float, *, only: tree.Patterns = "**") -> optax.GradientTransformation:
    """Pulls single weights to zero: the penalty is strength * sum |w|.

    On the scales of norms, `only=trace(fn, params, *args).scales`, it is the sparse
    training of network slimming, to be followed by `shrink(score=norm_scale())`.

    Args:
        strength: of the penalty, in units of the loss.
        only: patterns of the weights.

    Raises:
        ValueError: at `update`, where a pattern matches no weight or params are
            missing.

    Source: Liu et al. 2017, arXiv:1708.06519, equation 1.
    """

    def update(updates, state, params=None):
        weights = _weights("l1", params)
        chosen = tree.match(only, weights)
        return _add(
            updates, {p: strength * jnp.sign(weights[p]) for p in chosen}
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _weights(name: str, params: Any) -> dict[str, Array]:
    if params is None:
        raise ValueError(
            f"{name} is a penalty on the weights: call `tx.update(grads, state, "
            "params)`."
        )
    return tree.paths(params)


def _groups(program: Program, only: tree.Patterns) -> dict[str, list[_Member]]:
    """For each free coupling that is chosen, where multiplying weights hold it."""
    kernels = dict.fromkeys(s.path for s in program.sites)
    matched = set(tree.match(only, list(program.shapes)))
    groups: dict[str, list[_Member]] = {}
    chosen = [
        c
        for c in program.couplings.free
        if {p for p, _ in c.members if p in kernels} <= matched
    ]
    for c in chosen:
        held = dict.fromkeys((p, d) for p, d in c.members if p in kernels)
        groups[c.name] = [
            _Member(path, d, index)
            for path, d in held
            for name, index in program.couplings.occurrences(path, d)
            if name == c.name
        ]
    groups = {name: members for name, members in groups.items() if members}
    if not groups:
        raise ValueError(
            f"no coupling of which all multiplying weights match {only!r} can lose "
            "indices: print(program.couplings) says why."
        )
    return groups


def _penalty_grads(
    members: list[_Member], weights: Mapping[str, Array]
) -> dict[str, Array]:
    """The gradients of sum sqrt(n) * ||w|| over the indices of one coupling."""
    size = max(int(m.index.max()) for m in members) + 1
    squares, n = jnp.zeros(size), 0.0
    for m in members:
        w = weights[m.path]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        line = jnp.sum(
            jnp.abs(w.astype(wide)) ** 2, tuple(i for i in range(w.ndim) if i != m.dim)
        )
        squares = squares.at[np.where(m.index < 0, size, m.index)].add(
            line, mode="drop"
        )
        n += w.size / w.shape[m.dim] * np.sum(m.index == 0)
    # At zero the norm has a kink; there the weights stay.
    factor = jnp.where(squares > 0, np.sqrt(n) * jax.lax.rsqrt(squares + 1e-30), 0)
    grads: dict[str, Array] = {}
    for m in members:
        w = weights[m.path]
        along = jnp.where(m.index < 0, 0, factor[np.maximum(m.index, 0)])
        others = [i for i in range(w.ndim) if i != m.dim]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        grad = jnp.expand_dims(along, others) * w.astype(wide)
        grads[m.path] = grads[m.path] + grad if m.path in grads else grad
    return grads


def _add(updates: Any, extra: Mapping[str, Array]) -> Any:
    def add(keypath, u):
        more = extra.get(tree.path_name(keypath))
        return u if more is None else u + more.astype(u.dtype)

    return jax.tree_util.tree_map_with_path(add, updates)
