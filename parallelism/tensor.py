"""Tensor parallelism found by itself: which dims of which weights to split.

A coupling is a set of dims that must be cut at the same places: the hidden dim of an
MLP with the columns of one kernel and the rows of the next, the heads of an attention
in four. Splitting one over devices splits every product it is in; where a product sums
over it, the devices' parts have to be added up, and so does the gradient of whatever
meets it without having it. That is all that tensor parallelism sends, so for each
coupling it can be counted on the trace: those that stay inside of a block send little
for what they save, the width that runs through the whole model sends much. Of couplings
that meet in a weight or in an array, the cheaper is split.

For transformers this finds what was written by hand for them.

Source of the hand-written plan: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxeff import tree
from jaxeff.program import (
    atoms,
    bodies,
    Coupling,
    couplings_of,
    Dim,
    equation_flops,
    equations,
    find,
    MATMULS,
    solved,
    Solver,
    table,
    trace,
)

from .mesh import BATCH_AXES

_last = lambda n: lambda eqn: range(eqn.invars[0].aval.ndim)[-n(eqn) :]
_one = lambda key: lambda eqn: (eqn.params[key],)
_wide = lambda eqn: [d for d, n in enumerate(eqn.params["window_dimensions"]) if n > 1]
# Which dims of its operands an operation goes along, so that none can do it alone; for
# those that join or cut, where the parts of different devices would have to move.
_SERIAL: dict[str, Callable[[JaxprEqn], Sequence[int]]] = {
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _one("axis")),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split(),
        _wide,
    ),
    "sort": _one("dimension"),
    "concatenate": _one("dimension"),
    "top_k": _last(lambda eqn: 1),
    "fft": _last(lambda eqn: len(eqn.params["fft_lengths"])),
    "rev": lambda eqn: eqn.params["dimensions"],
    "pad": lambda eqn: [
        d for d, size in enumerate(eqn.params["padding_config"]) if any(size)
    ],
}
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
        splits: every coupling, in the order in which they were considered.
        grouped: kernels of grouped convolutions whose channels are not split.
    """

    axis: str
    devices: int
    specs: Mapping[str, P]
    splits: tuple[Split, ...]
    grouped: tuple[str, ...] = ()

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
        return table(head, rows)


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
    program = trace(fn, params, *args, **kwargs)
    solver, ins = solved(program.jaxpr, program.weights)
    kept = set(tree.match(whole, program.shapes, what="weight")) if whole else set()
    couplings = list(couplings_of(program.weights, ins))
    counted = _count(program.jaxpr, program.weights, solver, couplings)
    dims = dict(zip(program.weights, ins, strict=True))

    def cost(c: Coupling) -> tuple[bool, float, int]:
        n = counted[find(c.atom)]
        sent = n.forward + n.backward
        # First what is part of products, then what only stores.
        return n.flops == 0, sent / (n.flops or 1), -c.size

    splits: list[Split] = []
    taken: dict[Dim, str] = {}
    for c in sorted(couplings, key=cost):
        n = counted[find(c.atom)]
        reason = _hindrance(c, n, devices, dims, program.shapes, kept, taken)
        if reason is None:
            taken[find(c.atom)] = c.name
        members = tuple(c.members)
        splits.append(
            Split(c.name, c.size, members, n.flops, n.forward, n.backward, reason)
        )
    groups = {
        where: eqn.params.get("feature_group_count", 1)
        for where, eqn, _ in equations(program.jaxpr)
    }
    specs = _specs(program.shapes, dims, taken, axis)
    grouped = dict.fromkeys(
        site.path
        for site in program.sites
        if groups[site.where] > 1 and not any(specs[site.path])
    )
    plan = TensorPlan(axis, devices, specs, tuple(splits), tuple(grouped))
    if not plan.chosen:
        raise ValueError(
            f"nothing of this function can be split among {devices} devices. Take a "
            f"number that divides some size:\n{plan}"
        )
    return plan


def shard(
    fn: Callable,
    params: Any,
    *args: Any,
    mesh: Mesh,
    whole: tree.Patterns = (),
    **kwargs: Any,
) -> tuple[Callable, Any]:
    """The function, and its weights split over the axis `tensor` of a mesh.

    Under `jit` the compiler splits what is computed from them in the same way.

    Args:
        fn, params, args, kwargs, whole: as of `plan_tensor`.
        mesh: with an axis `tensor`. One of size 1 splits nothing.

    Raises:
        ValueError: nothing can be split among so many devices. Or a grouped convolution
            would stay whole while another axis of the mesh shares the batch: for the
            gradient of its kernel XLA then adds up the copies too (seen with jaxlib
            0.10: twice the gradient on two devices).
    """
    devices = mesh.shape["tensor"]
    if devices == 1:
        if whole:
            tree.match(whole, tree.paths(params))
        return fn, jax.device_put(params, NamedSharding(mesh, P()))
    plan = plan_tensor(fn, params, *args, devices=devices, whole=whole, **kwargs)
    sharing = [a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1]
    if plan.grouped and sharing:
        raise ValueError(
            f"with the batch shared over {sharing[0]}, XLA gets the gradient of grouped"
            f" convolutions wrong whose channels are not split over tensor, and here "
            f"{plan.grouped[0]} is not ({len(plan.grouped)} in all). Give tensor all "
            "devices, or none."
        )
    return fn, place(params, plan, mesh)


def place(params: Any, plan: TensorPlan, mesh: Mesh) -> Any:
    """The weights on their devices, as a plan says.

    Raises:
        ValueError: the plan is for other weights.
    """
    if other := tree.paths(params).keys() ^ plan.specs.keys():
        raise ValueError(
            f"the plan is for other weights than these: {sorted(other)[0]} is in one "
            "of the two alone. Make a plan for these."
        )
    shardings = {
        path: NamedSharding(mesh, plan.specs[path]) for path in tree.paths(params)
    }
    flat, structure = jax.tree.flatten(params)
    put = [jax.device_put(x, s) for x, s in zip(flat, shardings.values(), strict=True)]
    return jax.tree.unflatten(structure, put)


@dataclasses.dataclass
class _Counted:
    """What splitting an atom does."""

    flops: int = 0
    forward: int = 0
    backward: int = 0
    meets: set[Dim] = dataclasses.field(default_factory=set)
    met: bool = False
    serial: str = ""  # what goes along it, index by index


def _hindrance(
    c: Coupling,
    n: _Counted,
    devices: int,
    dims: Mapping[str | None, Sequence[Dim]],
    shapes: Mapping[str, Any],
    kept: set[str],
    taken: Mapping[Dim, str],
) -> str | None:
    """Why a coupling is not split, or None."""
    if c.size % devices:
        return f"{c.size} does not divide by {devices}"
    if not all(_leads(dims[path][d], c.atom) for path, d in c.members):
        return "its indices are not in one piece on each device"
    if pinned := [path for path, _ in c.members if path in kept]:
        return f"{pinned[0]} is to stay whole"
    paths = [path for path, _ in c.members]
    if len({*paths}) < len(paths):
        return "a weight has it twice"
    if others := [taken[a] for a in n.meets if a in taken]:
        return f"meets {others[0]}, which sends less"
    if not n.met:
        return "nothing is computed along it"
    if n.serial:
        return f"`{n.serial}` goes along it"
    if c.reason is not None and "has no rule" in c.reason:
        return c.reason
    size = lambda paths: sum(shapes[p].size * shapes[p].dtype.itemsize for p in paths)
    stored = size(paths)
    if n.flops == 0 and n.forward + n.backward >= stored:
        return "stores less than it would send"
    if n.flops == 0 and stored < WORTH_STORING * size(shapes):
        return "stores little, and is in no product"
    return None


def _leads(d: Dim, atom: Dim) -> bool:
    """Whether cutting a dim into equal pieces cuts the atom so."""
    d, atom = find(d), find(atom)
    while d.kind == "prod":
        d = find(d.parts[0])
    return d is atom


def _specs(
    shapes: Mapping[str, Any],
    dims: Mapping[str | None, Sequence[Dim]],
    taken: Mapping[Dim, str],
    axis: str,
) -> dict[str, P]:
    split = lambda d: any(find(a) in taken for a in atoms(d))
    return {
        path: P(*(axis if split(d) else None for d in dims[path])) for path in shapes
    }


def _count(
    jaxpr: ClosedJaxpr,
    weights: Sequence[str | None],
    solver: Solver,
    couplings: Sequence[Coupling],
) -> dict[Dim, _Counted]:
    """For each atom of the weights, what splitting it saves, and what it sends."""
    counted = {find(c.atom): _Counted() for c in couplings}
    ours = lambda dims: {find(a) for d in dims for a in atoms(d)} & counted.keys()
    seen: set[tuple] = set()
    live = {id(eqn) for _, eqn, _ in equations(jaxpr)}
    for where, eqn, times, trained in _visit(
        jaxpr, (), 1, [path is not None for path in weights]
    ):
        if id(eqn) not in live:
            continue
        env = solver.dims[where]
        dims_of = lambda v, env=env: () if isinstance(v, Literal) else env[v]
        given = [ours(dims_of(v)) for v in eqn.invars]
        out = set().union(*(ours(dims_of(v)) for v in eqn.outvars))
        flops = equation_flops(eqn) if eqn.primitive.name in MATMULS else 0
        for atom in _along(eqn, [dims_of(v) for v in eqn.invars]) & counted.keys():
            counted[atom].serial = eqn.primitive.name
        for atom in set().union(out, *given):
            n = counted[atom]
            n.met = True
            n.flops += times * flops
            for dims in (*given, out):
                if atom in dims:
                    n.meets |= dims - {atom}
            if atom not in out:
                n.forward += times * sum(map(_bytes, eqn.outvars))
                continue
            if not any(atom in dims for dims in given):
                continue
            for v, dims, learns in zip(eqn.invars, given, trained, strict=True):
                # The gradients of one array from several places are added up first.
                if atom in dims or not learns or (where, v, atom) in seen:
                    continue
                seen.add((where, v, atom))
                n.backward += times * _bytes(v)
    return counted


def _along(eqn: JaxprEqn, ins: Sequence[Sequence[Dim]]) -> set[Dim]:
    """The atoms that an operation goes along, so that no device can do it alone."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        specs = (numbers.lhs_spec, numbers.rhs_spec)
        dims = [x[d] for x, spec in zip(ins, specs, strict=True) for d in spec[2:]]
    elif eqn.primitive.name in _SERIAL:
        dims = [
            x[d] for x in ins for d in _SERIAL[eqn.primitive.name](eqn) if d < len(x)
        ]
    else:
        return set()
    return {find(a) for d in dims for a in atoms(d)}


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


def _visit(
    jaxpr: ClosedJaxpr, where: tuple, times: int, given: Sequence[bool]
) -> Iterator[tuple[tuple, JaxprEqn, int, list[bool]]]:
    """Every equation that holds no program: where its variables are, how often it runs,
    and which of its operands a gradient flows into.
    """
    learns: dict[Var, bool] = collections.defaultdict(bool)
    learns.update(zip(jaxpr.jaxpr.invars, given, strict=True))
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        floats = [
            not isinstance(v, Literal)
            and learns[v]
            and jnp.issubdtype(v.aval.dtype, jnp.inexact)
            for v in eqn.invars
        ]
        inner = bodies(eqn, (*where, i))
        for body in inner:
            if body.kind == "shard_map":
                continue
            entering = [floats[j] for j in body.operands]
            if body.kind in ("scan", "while"):
                # What is carried learns as soon as anything does.
                stacked = set(body.stacked)
                entering = [
                    f or (j not in stacked and any(floats))
                    for j, f in enumerate(entering)
                ]
            yield from _visit(
                body.jaxpr, body.where, times * (body.times or 1), entering
            )
        if not inner:
            yield where, eqn, times, floats
        learns.update(dict.fromkeys(eqn.outvars, any(floats)))
