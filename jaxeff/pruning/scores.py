"""How much each element of each weight matters, to decide which indices go.

A score maps the traced program and the weights, by path, to one number for each
element of some of them. `shrink` adds them up over everything that leaves with
an index: a channel's filter, its bias, its row in the next kernel.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Array

from jaxeff.program import Program

Score = Callable[[Program, Mapping[str, Array]], Mapping[str, np.ndarray]]


def magnitude(order: int = 2) -> Score:
    """Scores by size: an index's score is the p-norm (to the p) of what it removes.

    Only weights that multiply data count: a large running variance says nothing
    about the channel it normalises.

    Args:
        order: p. 1: Li et al. 2017, arXiv:1608.08710, section 3.1; 2: the
            squared Euclidean norm.

    Raises:
        ValueError: `order` is below 1.
    """
    if order < 1:
        raise ValueError(
            f"the order of a norm is at least 1, got {order}: take 1 or 2."
        )

    def score(program: Program, weights: Mapping[str, Array]) -> dict[str, np.ndarray]:
        used = dict.fromkeys(site.path for site in program.sites)
        return {
            path: np.abs(np.asarray(weights[path], np.float64)) ** order
            for path in used
        }

    return score
