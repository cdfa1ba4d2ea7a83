"""Compressed models on disk: arrays, and what they are, in one checkpoint.

The model's own definition stays with the model: `load_model` takes its function
and shapes and gives back the compressed function and parameters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxeff.program import describe, rebuild

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

    Args:
        folder: to be made.
        fn: the function that a technique returned, or the model's own.
        params: its parameters.
        meta: anything JSON can hold, given back by `load_model`.
        overwrite: replace a checkpoint that is there.

    Raises:
        ValueError: there is something at `folder` already.
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
        ValueError: no checkpoint there, a damaged one, or one of another model.
    """
    about = load_meta(folder)
    if "compression" not in about:
        raise ValueError(
            f"{folder} holds parameters alone, not a model: read it with load_params, "
            "or save it with save_model."
        )
    fn, shapes = rebuild(about["compression"], fn, params)
    params, _ = load_params(folder, shapes)
    return fn, params, about["user"]
