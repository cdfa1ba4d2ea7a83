"""Which dims of weights a scan takes slices along: those that count layers."""

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr

from .sites import follow, weight_origins
from .walk import bodies, Where


def find_scanned(
    jaxpr: ClosedJaxpr, weights: Sequence[str | None]
) -> tuple[dict[str, set[int]], set[Where]]:
    """By path the dims that scans slice; the scans that do, and all that holds one.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the path of the weight it is, or None.
    """
    dims: dict[str, set[int]] = {}
    scans: set[Where] = set()

    def visit(where, eqn, origins, times):
        for body in bodies(eqn, where):
            for origin in (origins[j] for j in body.stacked):
                if origin is not None:
                    dims.setdefault(origin.path, set()).update(origin.dims[0])
                    scans.update(where[:n] for n in range(1, len(where) + 1))

    follow(jaxpr, weight_origins(jaxpr, weights), visit)
    return dims, scans
