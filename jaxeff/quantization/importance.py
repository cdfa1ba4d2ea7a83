"""How much each weight's error counts in the outputs: the mean square of its input.

The squared error of `x @ w.T` is the sum over inputs of their mean square times the
squared error of the weights they meet, if inputs do not correlate: the diagonal of
the Hessian. It weighs the errors that scales and codebooks are fitted to.

Source: Choi et al. 2016, arXiv:1612.01543, section 3.2.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxeff import tree
from jaxeff.program import calibrate, find_uses, squares

from .choice import Choice


def importances(
    fn: Callable,
    params: PyTree,
    args: tuple,
    batches: Iterable[tuple],
    choices: Iterable[Choice],
    progress: bool,
) -> dict[str, Float[Array, "..."]]:
    """For each weight that data can tell of, what the error of each entry counts.

    Args:
        fn, params, args: as for `quantize`.
        batches: tuples of arguments.
        choices: a format for each weight; of those without one nothing is asked.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        By path; of the weight's shape, with mean 1.
    """
    candidates = find_uses(fn, params, args).candidates
    able = lambda path: path in candidates and not candidates[path].reason
    paths = [c.path for c in choices if c.format is not None and able(c.path)]
    weights = tree.paths(params)
    found = {p: jnp.zeros(weights[p].shape, jnp.float32) for p in paths}

    def look(part, w, total):
        each = jnp.broadcast_to(total[:, None], w.shape)
        flat = found[part.path].reshape(-1).at[part.elements].set(each)
        found[part.path] = flat.reshape(found[part.path].shape)
        return w

    calibrate(
        fn,
        params,
        batches,
        weights=paths,
        statistic=squares,
        update=look,
        progress=progress,
    )
    one = lambda x: jnp.where(jnp.mean(x) > 0, x / jnp.mean(x), 1.0)
    return {path: one(x) for path, x in found.items()}
