"""A gradient that XLA gets wrong, so that nobody trains with it unawares.

Where the batch is split over some axes of a mesh and another axis holds copies, the
partitioner adds up the gradient of a grouped convolution's kernel over the copies too:
on two of them it is twice what it should be. Seen with jaxlib 0.10 and 0.12 on the CPU.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from jax.sharding import Mesh

from jaxeff.program import equations, Program, Site, trace

from .mesh import BATCH_AXES


def grouped_sites(program: Program) -> list[Site]:
    """Where a weight is the kernel of a grouped convolution."""
    grouped = {
        where
        for where, eqn, _ in equations(program.jaxpr)
        if eqn.params.get("feature_group_count", 1) > 1
    }
    return [site for site in program.sites if site.where in grouped]


def copying_axes(mesh: Mesh, manual: Collection[str] = ()) -> list[str]:
    """The axes that hold copies while others share a batch.

    Args:
        mesh: any.
        manual: axes that a `shard_map` takes from the compiler.
    """
    wide = [a for a, n in mesh.shape.items() if n > 1 and a not in manual]
    copies = [a for a in wide if a not in BATCH_AXES]
    return copies if len(copies) < len(wide) else []


def check_grouped(
    sites: Iterable[Site],
    mesh: Mesh,
    *,
    manual: Collection[str] = (),
    split: Callable[[str], Collection[str]] = lambda path: (),
) -> None:
    """Refuses a mesh on which the gradient of a grouped convolution would be wrong.

    Args:
        sites: from `grouped_sites`.
        mesh: for the function.
        manual: axes that a `shard_map` takes from the compiler.
        split: the axes over which the channels of a kernel are split, by its path.

    Raises:
        ValueError: as said.
    """
    copying = copying_axes(mesh, manual)
    for site in sites:
        left = [a for a in copying if a not in split(site.path)]
        if left:
            sharing = [a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1]
            raise ValueError(
                f"with the batch shared over {sharing[0]} and copies along {left[0]}, "
                f"XLA gets the gradient of grouped convolutions wrong, and {site.path} "
                f"is the kernel of one. Give the {mesh.shape[left[0]]} devices of "
                f"{left[0]} to {sharing[0]}."
            )


def check_function(
    fn: Callable, mesh: Mesh, *args: Any, manual: Collection[str] = (), **kwargs: Any
) -> None:
    """`check_grouped` for a function of weights and more; it is traced if need be."""
    if copying_axes(mesh, manual):
        program = trace(fn, *args, **kwargs)
        check_grouped(grouped_sites(program), mesh, manual=manual)
