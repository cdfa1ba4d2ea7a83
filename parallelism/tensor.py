"""Tensor parallelism found by itself: which dims of which weights to split.

A coupling is a set of dims that must be cut at the same places: the hidden dim of an
MLP with the columns of one kernel and the rows of the next, the heads of an attention
in four. Splitting one over devices splits every product it is in; where a product sums
over it, the devices' parts have to be added up, and so does the gradient of whatever
meets it without having it. That is all that tensor parallelism sends, so for each
coupling it can be counted on the trace: those that stay inside of a block send little
for what they save, the width that runs through the whole model sends much. Of couplings
that meet in a weight or in an array, the cheaper is split.

For transformers this finds what was written by hand for them. A kernel that holds
several in one (queries, keys and values) is kept as the several: see `pieces.py`.

Source of the hand-written plan: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxeff import tree
from jaxeff.program import Cut, notes, Program, table, trace, unlift

from .grouped import check_function, check_grouped, grouped_weights
from .mesh import axis_size
from .parts import put
from .pieces import divide, divided, Division, joins, Pieces, Piecewise

# What is in no product is split for its memory alone, from this part of all weights on:
# an embedding is, and a table of positions is not worth a message.
WORTH_STORING = 0.05


@dataclasses.dataclass(frozen=True)
class Split:
    """A coupling, and what splitting it over the devices would do.

    Attributes:
        coupling: its name in `trace(...).couplings`.
        size: its number of indices.
        members: (path of a weight, dim of it), all that are cut with it.
        flops: of the products that are split, of one forward pass.
        forward, backward: bytes of the arrays that are summed over the devices, in a
            forward and in a backward pass; there the sum of several gradients of one
            array counts once, and the compiler may add up each.
        reason: why it is not split; None where it is.
    """

    coupling: str
    size: int
    members: tuple[tuple[str, int], ...]
    flops: int
    forward: int
    backward: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """Which dims of which weights are split over an axis.

    Attributes:
        axis: of the mesh.
        devices: of the axis.
        specs: by path, for every weight.
        pieces: by path, for weights that hold several in one; the specs of these are
            those of each piece that is split.
        splits: every coupling, in the order in which they were considered.
        grouped: the weights in kernels of grouped convolutions.
    """

    axis: str
    devices: int
    specs: Mapping[str, P]
    splits: tuple[Split, ...]
    grouped: tuple[str, ...] = ()
    pieces: Mapping[str, Division] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self) -> list[Split]:
        """The couplings that are split."""
        return [s for s in self.splits if s.reason is None]

    @property
    def forward(self) -> int:
        """Bytes of the arrays that are summed over the devices in a forward pass."""
        return sum(s.forward for s in self.chosen)

    @property
    def backward(self) -> int:
        """The same in a backward pass."""
        return sum(s.backward for s in self.chosen)

    def __str__(self) -> str:
        """A row for each coupling."""
        rows = [
            (
                s.coupling,
                _names(s.members),
                str(s.size),
                f"{s.flops:,}",
                f"{s.forward:,}",
                f"{s.backward:,}",
                "split" if s.reason is None else s.reason,
            )
            for s in self.splits
        ]
        head = (
            "coupling",
            "weights",
            "size",
            "FLOPs split",
            "bytes forward",
            "backward",
            "",
        )
        rows.append(
            ("all", "", "", "", f"{self.forward:,}", f"{self.backward:,}", "split")
        )
        apart = [
            (path, f"kept in {len(found.pieces)} pieces along dim {found.dim}")
            for path, found in self.pieces.items()
        ]
        return "\n".join([table(head, rows), *notes(apart)])


def _names(members: Sequence[tuple[str, int]]) -> str:
    paths = list(dict.fromkeys(path for path, _ in members))
    return f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"


def plan_tensor(
    fn: Callable,
    params: Any,
    *args: Any,
    devices: int,
    axis: str = "tensor",
    whole: tree.Patterns = (),
    **kwargs: Any,
) -> TensorPlan:
    """Which couplings of `fn(params, *args, **kwargs)` to split over some devices.

    Nothing is computed: arrays may be given as their shapes.

    Args:
        fn: any function that JAX can trace.
        params: its weights, a pytree.
        args, kwargs: the rest, as it will be called with: bytes depend on the batch.
        devices: that share each layer.
        axis: of the mesh.
        whole: patterns of weights that are not to be split.

    Raises:
        ValueError: nothing can be split among so many devices; the reasons are listed.
            Or a pattern matches no weight.
    """
    if devices < 1:
        raise ValueError(f"1 device or more share each layer, got {devices}.")
    program = trace(fn, params, *args, **kwargs)
    kept = set(tree.match(whole, program.shapes, what="weight")) if whole else set()
    # Only running the function tells whether it takes pieces apart before it needs all.
    together: frozenset[str] = frozenset()
    while True:
        plan = _plan(program, devices, axis, kept, together)
        joined = joins(fn, divided(params, plan.pieces), args, kwargs)
        if not joined:
            break
        together |= {plan.pieces[path].coupling for path in joined}
    if not plan.chosen:
        raise ValueError(
            f"nothing of this function can be split among {devices} devices. Take a "
            f"number that divides some size:\n{plan}"
        )
    return plan


def _plan(
    program: Program,
    devices: int,
    axis: str,
    kept: set[str],
    together: frozenset[str],
) -> TensorPlan:
    """The plan, given which weights stay whole and which couplings need all of them.

    Args:
        program, devices, axis: as of `plan_tensor`.
        kept: paths.
        together: names of couplings whose pieces are put together.
    """

    def cost(cut: Cut) -> tuple[bool, float, int]:
        sent = cut.forward + cut.backward
        # First what is part of products, then what only stores.
        return cut.flops == 0, sent / (cut.flops or 1), -cut.coupling.size

    splits: list[Split] = []
    chosen: list[Cut] = []
    for cut in sorted(program.cuts.all, key=cost):
        c = cut.coupling
        reason = _hindrance(cut, devices, program.shapes, kept, chosen)
        if reason is None and c.name in together:
            reason = "a weight holds it beside others, and they are used as one"
        if reason is None:
            chosen.append(cut)
        splits.append(
            Split(
                c.name,
                c.size,
                tuple(c.members),
                cut.flops,
                cut.forward,
                cut.backward,
                reason,
            )
        )
    specs = {
        path: P(*(axis if cut else None for cut in program.cuts.touched(path, chosen)))
        for path in program.shapes
    }
    grouped = tuple(grouped_weights(program))
    pieces = {
        path: Division(dim, found, cut.coupling.name)
        for cut in chosen
        for (path, dim), found in cut.pieces.items()
        if len(found) > 1
    }
    return TensorPlan(axis, devices, specs, tuple(splits), grouped, pieces)


def shard(
    fn: Callable,
    params: Any,
    *args: Any,
    mesh: Mesh,
    whole: tree.Patterns = (),
    **kwargs: Any,
) -> tuple[Callable, Any]:
    """The function, and its weights split over the axis `tensor` of a mesh.

    Under `jit` the compiler splits what is computed from them in the same way. Weights
    that hold several in one, of which each is to be split, become `Pieces`: arrays of
    their own that train like others; `program.dense` makes one array of them.

    Args:
        fn, params, args, kwargs, whole: as of `plan_tensor`; of shapes it makes shapes
            that know how they lie.
        mesh: with an axis `tensor`. One of size 1 splits nothing.

    Raises:
        ValueError: nothing can be split among so many devices. Or XLA would get the
            gradient of a grouped convolution wrong, see `grouped.py`.
    """
    devices = axis_size(mesh, "tensor")
    if devices == 1:
        if whole:
            tree.match(whole, tree.paths(params))
        check_function(fn, mesh, params, *args, **kwargs)
        everywhere = NamedSharding(mesh, P())
        return fn, jax.tree.map(lambda x: put(x, everywhere), params)
    plan = plan_tensor(fn, params, *args, devices=devices, whole=whole, **kwargs)
    cut = lambda path: {"tensor"} if any(plan.specs[path]) else set()
    check_grouped(plan.grouped, mesh, split=cut)
    placed = place(params, plan, mesh)
    return (Piecewise(unlift(fn)) if plan.pieces else fn), placed


def place(params: Any, plan: TensorPlan, mesh: Mesh) -> Any:
    """The weights on their devices, as a plan says.

    Where the plan has pieces, the function that takes them is that of `shard`.

    Raises:
        ValueError: the plan is for other weights.
    """
    if other := tree.paths(params).keys() ^ plan.specs.keys():
        raise ValueError(
            f"the plan is for other weights than these: {sorted(other)[0]} is in one "
            "of the two alone. Make a plan for these."
        )

    def on(path: str, x: Any) -> Any:
        spec = plan.specs[path]
        to = lambda x, spec: put(x, NamedSharding(mesh, spec))
        found = plan.pieces.get(path)
        if found is None:
            return to(x, spec)
        left = P(*(None if d == found.dim else a for d, a in enumerate(spec)))
        specs = [spec if cut else left for _, cut in found.pieces]
        x = divide(x, found)
        return Pieces(tuple(map(to, x.arrays, specs)), x.dim)

    new = [on(path, x) for path, x in tree.paths(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), new)


def _hindrance(
    cut: Cut,
    devices: int,
    shapes: Mapping[str, Any],
    kept: set[str],
    chosen: Sequence[Cut],
) -> str | None:
    """Why a coupling is not split, or None."""
    c = cut.coupling
    if c.size % devices:
        return f"{c.size} does not divide by {devices}"
    if cut.given:
        return "the data have it, and are not split"
    if not all(cut.pieces.values()):
        return "its indices are in too many pieces"
    paths = [path for path, _ in c.members]
    if pinned := [path for path in paths if path in kept]:
        return f"{pinned[0]} is to stay whole"
    if len({*paths}) < len(paths):
        return "a weight has it twice"
    if others := [other for other in chosen if other.coupling.name in cut.meets]:
        return f"meets {others[0].coupling.name}, which sends less"
    if not cut.met:
        return "nothing is computed along it"
    if cut.serial:
        return f"`{cut.serial}` goes along it"
    if c.reason is not None and "has no rule" in c.reason:
        return c.reason
    size = lambda paths: sum(shapes[p].size * shapes[p].dtype.itemsize for p in paths)
    stored = size(paths)
    if cut.flops == 0 and cut.forward + cut.backward >= stored:
        return "stores less than it would send"
    if cut.flops == 0 and stored < WORTH_STORING * size(shapes):
        return "stores little, and is in no product"
    return None
