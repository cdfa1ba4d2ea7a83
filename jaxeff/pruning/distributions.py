"""How many weights each layer loses, where the whole model loses a given fraction.

A distribution sees the units of every weight (`patterns.py`) and returns a count for
each. Those that look at shapes alone can be asked beforehand: `layer_sparsities`.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from .ranking import shared_counts

Dims = tuple[int, ...]
Sparsity = Float[Array, ""] | float | int


class Units(NamedTuple):
    """The units of one weight that come and go together.

    Attributes:
        keys: in the order of their scores.
        along: the dims of `keys` that compete; the counts are of slices over them.
        layer: the shape of what competes, in weights.
    """

    keys: Int32[Array, "..."]
    along: Dims
    layer: Dims

    @property
    def number(self) -> int:
        """How many units compete with each other."""
        return math.prod(self.keys.shape[d] for d in self.along)


Counts = dict[str, Int[Array, ""]]
Distribution = Callable[[Mapping[str, Units], Sparsity], Counts]


def uniform(units: Mapping[str, Units], sparsity: Sparsity) -> Counts:
    """The same sparsity for every weight: round(sparsity * size) go."""
    return {path: _part(u, sparsity) for path, u in units.items()}


def erdos_renyi(units: Mapping[str, Units], sparsity: Sparsity) -> Counts:
    """Density in proportion to (n_in + n_out) / (n_in n_out), the last two dims.

    Of kernels whose channels stand elsewhere (OIHW) `erk` is the one to take: it asks
    for no order.

    A layer whose share would be more than it has stays dense, and the others take
    what it leaves: so every sparsity can be reached.

    Source: Mocanu et al. 2018, arXiv:1707.04780.
    """
    return _by_shape(units, sparsity, lambda shape: _density(shape[-2:]))


def erk(units: Mapping[str, Units], sparsity: Sparsity) -> Counts:
    """Erdos-Renyi-kernel: density in proportion to sum(shape) / prod(shape).

    As `erdos_renyi`, with the kernel's height and width among the dims.

    Source: Evci et al. 2020, arXiv:1911.11134, section 3, (1).
    """
    return _by_shape(units, sparsity, _density)


def global_ranking(units: Mapping[str, Units], sparsity: Sparsity) -> Counts:
    """One threshold for all weights: each loses what lies below it.

    A layer may lose everything. Weights that are spread over devices stay there.

    Raises:
        ValueError: a pattern gives every group or layer a count of its own.
    """
    apart = [p for p, u in units.items() if len(u.along) < u.keys.ndim]
    if apart:
        raise ValueError(
            "one threshold for all leaves no group a count of its own, but the pattern "
            f"counts within {', '.join(apart)}. Use `uniform` with it."
        )
    counts = shared_counts([u.keys for u in units.values()], sparsity)
    return dict(zip(units, counts, strict=True))


def layer_sparsities(
    shapes: Mapping[str, Dims], sparsity: float | int, distribution: Distribution
) -> dict[str, float]:
    """The fraction that each layer would lose, to look at before training.

    Args:
        shapes: of the weights, by any name.
        sparsity: of all of them together, in [0, 1).
        distribution: `uniform`, `erdos_renyi` or `erk`; 0 stands at the layers that
            it leaves dense.

    Raises:
        ValueError: the distribution looks at scores, which shapes do not have.
    """
    if distribution is global_ranking:
        raise ValueError(
            "global_ranking looks at the scores of the weights, but here are only "
            "shapes. `make_masks` shows what it makes of scores."
        )
    units = {
        name: Units(jnp.zeros(shape, jnp.int32), tuple(range(len(shape))), shape)
        for name, shape in shapes.items()
    }
    counts = distribution(units, sparsity)
    return {name: int(counts[name]) / math.prod(shapes[name]) for name in shapes}


def _part(units: Units, sparsity: Sparsity) -> Int[Array, ""]:
    return jnp.round(sparsity * jnp.float32(units.number)).astype(jnp.int32)


def _density(shape: Dims) -> float:
    return sum(shape) / math.prod(shape)


def _by_shape(
    units: Mapping[str, Units], sparsity: Sparsity, density: Callable[[Dims], float]
) -> Counts:
    if grouped := [path for path, u in units.items() if len(u.layer) < 2]:
        raise ValueError(
            "a distribution by shape needs layers of two dims or more to compete as a "
            f"whole, but {', '.join(grouped)} has groups or vectors. Use `uniform`."
        )
    raw = np.array([density(u.layer) for u in units.values()])
    layers = [math.prod(u.keys.shape) // max(u.number, 1) for u in units.values()]
    sizes = np.array(
        [n * math.prod(u.layer) for n, u in zip(layers, units.values(), strict=True)],
        np.float64,
    )
    densities = _fill(raw, sizes, sparsity)
    return {
        path: _part(u, 1 - densities[i]) for i, (path, u) in enumerate(units.items())
    }


def _fill(
    raw: np.ndarray, sizes: np.ndarray, sparsity: Sparsity
) -> Float[Array, " layers"]:
    """Densities min(1, c * raw), with the c that gives the sparsity of all."""
    order = np.argsort(-raw, kind="stable")
    wanted, before = raw[order], sizes[order].cumsum() - sizes[order]
    rest = (raw * sizes)[order][::-1].cumsum()[::-1]
    # With the k most wanting layers dense, c follows; the first k that fits is it.
    c = ((1 - sparsity) * jnp.float32(sizes.sum()) - before) / rest
    fits = (c * wanted <= 1).at[-1].set(True)
    return jnp.minimum(1, c[jnp.argmax(fits)] * raw.astype(np.float32))
