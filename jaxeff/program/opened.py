"""A model whose compressed weights are seen as the arrays they are made of."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jaxeff import tree


def opened(
    fn: Callable, params: PyTree, closed: Callable[[Any], bool]
) -> tuple[Callable, dict[str, Any], Callable[[dict[str, Any]], PyTree]]:
    """The same function of a flat dict, in which leaves are their parts.

    Args:
        fn: `fn(params, *args)`.
        params: its weights.
        closed: which leaves stay as they are.

    Returns:
        The function, its weights by path, and what brings such a dict back to the form
        of `params`.
    """
    flat, treedef = tree.paths(params, closed), jax.tree.structure(params, closed)
    close = lambda flat: jax.tree.unflatten(treedef, [flat[path] for path in order])
    order = list(flat)
    return lambda flat, *args: fn(close(flat), *args), flat, close
