"""How each weight is used: which of its dims are summed over, put out or stacked.

Patterns group weights along the dims that a product sums over, and treat the layers
of a scanned stack one by one. Which dims these are is read from the traced program,
never from a name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxeff import program

Dims = tuple[int, ...]
# The dims of every weight, or of each by its path.
DimsOf = int | Sequence[int] | Mapping[str, int | Sequence[int]]


class WeightDims(NamedTuple):
    """Dims of weights by path, for the weights that one use or several alike have.

    Attributes:
        contract: dims that products sum over, in order; `(0, 1, 2)` of a convolution.
        output: dims that appear in the result.
        stacked: the others: a scan's layers, the experts of a batched product.
    """

    contract: dict[str, Dims]
    output: dict[str, Dims]
    stacked: dict[str, Dims]


def weight_dims(fn: Callable, params: PyTree, *args: Any) -> WeightDims:
    """Traces `fn` and says which dims of each weight its products sum over.

    A weight that only a look-up uses is left out, for nothing sums over it; and so
    is one that two products use in different ways.

    Args:
        fn: `fn(params, *args)`.
        params, args: arrays, or their shapes.

    Raises:
        ValueError: no weight takes part in a product.
    """
    uses: dict[str, set[tuple[Dims, Dims, Dims]]] = {}
    for site in program.trace(fn, params, *args).sites:
        if site.contract:
            use = (site.contract, site.output, site.batch)
            uses.setdefault(site.path, set()).add(use)
    if not uses:
        raise ValueError(
            "weight_dims reads how products use the weights, but no weight of this "
            "function takes part in one. Trace the function that the model computes."
        )
    one = {path: next(iter(ways)) for path, ways in uses.items() if len(ways) == 1}
    return WeightDims(*({path: use[i] for path, use in one.items()} for i in range(3)))


def dims_of(dims: DimsOf, path: str, ndim: int) -> Dims | None:
    """The dims of one weight, counted from the front; None where none are given.

    Raises:
        ValueError: a dim is out of range or given twice.
    """
    given = dims.get(path) if isinstance(dims, Mapping) else dims
    if given is None:
        return None
    wanted = (given,) if isinstance(given, int) else tuple(given)
    if any(not -ndim <= d < ndim for d in wanted):
        raise ValueError(f"{path} has {ndim} dims, but dims {wanted} are given for it.")
    counted = tuple(d % ndim for d in wanted)
    if len(set(counted)) < len(counted):
        raise ValueError(f"each dim of {path} is given once, but got {wanted}.")
    return counted
