"""A gradient that XLA gets wrong, so that nobody trains with it unawares.

Where the batch is split over some axes of a mesh and another axis holds copies, the
partitioner adds up the gradient of a grouped convolution's kernel over the copies too:
on two of them it is twice what it should be. Seen with jaxlib 0.10 and 0.12 on the CPU.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from jax.sharding import Mesh

from jaxeff.program import gradients_reach, Program, trace

from .mesh import BATCH_AXES


def grouped_weights(program: Program) -> list[str]:
    """The weights that get their gradient through the kernel of a grouped convolution.

    Where a kernel is computed (standardised, masked, made by other weights), the
    largest of those that it is computed from.
    """
    size = lambda path: program.shapes[path].size
    found = [
        max(sorted(given[1]), key=size)
        for eqn, given in gradients_reach(program)
        if eqn.params.get("feature_group_count", 1) > 1 and given[1]
    ]
    return list(dict.fromkeys(found))


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
    paths: Iterable[str],
    mesh: Mesh,
    *,
    manual: Collection[str] = (),
    split: Callable[[str], Collection[str]] = lambda path: (),
) -> None:
    """Refuses a mesh on which the gradient of a grouped convolution would be wrong.

    Args:
        paths: from `grouped_weights`.
        mesh: for the function.
        manual: axes that a `shard_map` takes from the compiler.
        split: the axes over which the channels of a kernel are split, by its path.

    Raises:
        ValueError: as said.
    """
    copying = copying_axes(mesh, manual)
    for path in paths:
        left = [a for a in copying if a not in split(path)]
        if left:
            sharing = [a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1]
            raise ValueError(
                f"with the batch shared over {sharing[0]} and copies along {left[0]}, "
                f"XLA gets the gradient of grouped convolutions wrong, and {path} "
                f"is the kernel of one. Give the {mesh.shape[left[0]]} devices of "
                f"{left[0]} to {sharing[0]}."
            )


def check_function(
    fn: Callable, mesh: Mesh, *args: Any, manual: Collection[str] = (), **kwargs: Any
) -> None:
    """`check_grouped` for a function of weights and more; it is traced if need be."""
    if copying_axes(mesh, manual):
        program = trace(fn, *args, **kwargs)
        check_grouped(grouped_weights(program), mesh, manual=manual)
