"""What a calibration is given: batches of arguments, and weights that have values.

A bare array in the place of a batch would be taken apart into its rows, silently if
there is but one; a shape in the place of a weight fails far from where it was passed.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import PyTree

from jaxeff import tree


def check_batches(batches: Iterable[Any]) -> list[tuple]:
    """The batches as a list, if there are any and each is a tuple of arguments.

    Raises:
        ValueError: there is none, or one is no tuple.
    """
    given = list(batches)
    if not given:
        raise ValueError(
            "calibration needs data, got no batch: give `batches=`, an iterable of "
            "tuples of arguments."
        )
    for batch in given:
        if not isinstance(batch, tuple):
            raise ValueError(
                f"a batch is a tuple of arguments, got a {type(batch).__name__}: write "
                "`(x,)` where there is only one."
            )
    return given


def check_values(params: PyTree, what: str) -> None:
    """Refuses shapes in the place of weights.

    Args:
        params: the weights.
        what: needs their values, for the message: "gptq".

    Raises:
        ValueError: a weight is a `ShapeDtypeStruct`.
    """
    for path, x in tree.paths(params).items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{what} needs the values of the weights, but {path} is only a shape, "
                f"{tuple(x.shape)}: pass arrays."
            )
