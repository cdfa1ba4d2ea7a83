"""A traced function, ready to be looked at: its sites, couplings and costs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr

from jaxeff import tree

from .call import Call
from .costs import Costs, count
from .couplings import Couplings, find_couplings
from .cuts import Cuts, find_cuts
from .leaf import coded, packed
from .scalings import find_scalings, Scaling
from .scanned import find_scanned
from .sites import find_scales, find_sites, Site
from .table import table


class Program:
    """A function as traced on some operands. Each view is computed when first read.

    Attributes:
        jaxpr: the program.
        weights: for each of its inputs the path of the weight it is, or None.
        shapes: the shape and dtype of each weight by path; those of each array of a
            leaf.
        packed: by path, how many numbers an array holds that has several in one.
    """

    def __init__(self, call: Call, packed: Mapping[str, int] | None = None):
        self.call = call
        self.packed = packed or {}
        self.jaxpr: ClosedJaxpr = call.jaxpr
        self.weights = call.weights
        self.shapes = {
            path: v.aval
            for path, v in zip(call.weights, call.jaxpr.jaxpr.invars, strict=True)
            if path is not None
        }

    @functools.cached_property
    def sites(self) -> list[Site]:
        """Where each weight meets data."""
        return find_sites(self.jaxpr, self.weights)

    @functools.cached_property
    def scales(self) -> list[str]:
        """The weights that scale channels, one number for each, as those of norms."""
        return find_scales(self.jaxpr, self.weights)

    @functools.cached_property
    def couplings(self) -> Couplings:
        """Which dims of which weights must change together."""
        return find_couplings(self.jaxpr, self.weights)

    @functools.cached_property
    def cuts(self) -> Cuts:
        """What cutting each coupling over devices would split and send."""
        return find_cuts(self.jaxpr, self.weights)

    @functools.cached_property
    def scanned(self) -> dict[str, set[int]]:
        """By path the dims of weights along which scans take slices, layer by layer."""
        return find_scanned(self.jaxpr, self.weights)[0]

    @functools.cached_property
    def scalings(self) -> list[Scaling]:
        """Which weights can be multiplied together without changing the function.

        None of leaves that hold codes: a code multiplied is another code.
        """
        return find_scalings(self.jaxpr, self.weights, coded(self.call.params))

    @functools.cached_property
    def costs(self) -> Costs:
        """FLOPs and bytes moved, in all and by weight."""
        return count(self.jaxpr, self.sites)

    def __str__(self) -> str:
        """A table of the weights: shape, what they cost, and how they couple."""
        rows = []
        sizes = {path: a.size for path, a in self.shapes.items()}
        sizes.update(self.packed)
        for path, aval in self.shapes.items():
            cost = self.costs.weights.get(path)
            dims = map(self.couplings.describe, self.couplings.dims[path])
            rows.append(
                (
                    path,
                    f"({', '.join(dims)})",
                    tree.dtype_name(aval.dtype),
                    f"{sizes[path]:,}",
                    "" if cost is None else f"{cost.flops:,}",
                    "" if cost is None else f"{cost.bytes:,}",
                )
            )
        rows.append(
            (
                "total",
                "",
                "",
                f"{sum(sizes.values()):,}",
                f"{self.costs.flops:,}",
                f"{self.costs.bytes:,}",
            )
        )
        head = (
            "weight",
            "dims: couplings",
            "dtype",
            "elements",
            "FLOPs",
            "bytes moved",
        )
        free = len(self.couplings.free)
        note = (
            f"{len(self.sites)} sites; {len(self.couplings)} couplings, {free} free "
            "(* frozen: `print(program.couplings)` says why; x joins factors, + parts)"
        )
        return f"{table(head, rows)}\n{note}"


def trace(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Program:
    """Traces `fn(params, *args, **kwargs)` once, to be looked at.

    Nothing is computed and nothing allocated: any array may be given as a
    `jax.ShapeDtypeStruct`. A function of compressed weights is traced as it
    runs, with the arrays of each leaf as weights of their own.

    Args:
        fn: any function that JAX can trace.
        params: its weights, a pytree.
        args, kwargs: the rest; what is not an array is a constant of the trace.
    """
    return Program(Call(fn, params, args, kwargs, open_leaves=True), packed(params))
