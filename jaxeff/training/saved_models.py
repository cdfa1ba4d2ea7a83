"""Compressed models on disk: arrays, and what they are, in one checkpoint.

The model's own definition stays with the model: `load_model` takes its function
and shapes and gives back the compressed function and parameters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxeff.program import describe, is_original, rebuild

from .checkpoint import load_meta, load_params, save_params


def save_model(
    folder: str | Path,
    fn: Callable,
    params: PyTree,
    meta: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Saves a model, dense or compressed in whatever way.

    Of the function only what was done to it is stored (shrunk, lifted, in mixed
    precision ...), so it has to be the one that the techniques returned; `jax.jit`
    and a `functools.partial` of keywords alone may be around it, a lambda may not.

    Args:
        folder: to be made.
        fn: the function that a technique returned, or the model's own.
        params: its parameters.
        meta: anything JSON can hold, given back by `load_model`.
        overwrite: replace a checkpoint that is there.

    Raises:
        ValueError: there is something at `folder` already; or `fn` hides how it was
            rewritten, see `jaxeff.program.describe`.
    """
    about = {"compression": describe(fn, params), "user": dict(meta or {})}
    save_params(folder, params, about, overwrite=overwrite)


def load_model(
    folder: str | Path, fn: Callable, params: PyTree
) -> tuple[Callable, PyTree, dict[str, Any]]:
    """A saved model: its function, its parameters, and the meta it was saved with.

    Args:
        folder: that `save_model` made.
        fn: the original model's function (or another of its functions).
        params: the original model's parameters, or their shapes
            (`jax.eval_shape(model.init, key, x)`).

    Raises:
        ValueError: no checkpoint there, a damaged one, or one of another model; or
            a leaf of a class outside of jaxeff whose module was not imported.
    """
    about = load_meta(folder)
    if "compression" not in about:
        raise ValueError(
            f"{folder} holds parameters alone, not a model: read it with load_params, "
            "or save it with save_model."
        )
    compression = about["compression"]
    fn, shapes = rebuild(compression, fn, params)
    try:
        params, _ = load_params(folder, shapes)
    except ValueError as error:
        if not is_original(compression):
            raise
        raise ValueError(
            f"{error} It was saved with a function to which nothing was done; if its "
            "parameters are those of a compressed one, that function was not passed to "
            "save_model: save again with the one that the technique returned, or pass "
            "load_model that function and the compressed parameters' shapes."
        ) from None
    return fn, params, about["user"]
