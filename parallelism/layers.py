"""Layer parallelism: consecutive layers on different devices, for any function.

    fn, params = layer_parallel(fn, params, x, mesh=make_mesh(pipe=4))

The traced program is cut where few arrays cross, and so that the heaviest piece is as
light as can be; nothing has to be known of layers. Each device of the axis `pipe` holds
the weights of its piece and computes it when the one before is done, so memory is
shared out and time is not: for that, cut the batch with `pipeline`.

All devices run one program. Pieces differ, but the devices' memory may not, so a device
holds its weights in one row of numbers for each dtype, filled up to the longest.

Source: Narayanan et al. 2019, arXiv:1806.03377, section 3.1, for cutting by cost.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from jaxeff import tree
from jaxeff.program import Chain, Crossing, is_leaf, Piece, shapes, table, WeightPart
from jaxeff.tree import pytree

from .balance import balance
from .grouped import check_function
from .mesh import axis_size


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Where a function is cut.

    Attributes:
        places: after how many steps of the traced program, for each cut.
        flops: of each piece; a multiply-add is 2.
        weights: bytes of the weights that each piece has alone.
        sends: bytes that each hands on to the next, in a forward pass.
        sources: line of code of the last step of each.
        shared: bytes of the weights that several use, which all devices have.
    """

    places: tuple[int, ...]
    flops: tuple[int, ...]
    weights: tuple[int, ...]
    sends: tuple[int, ...]
    sources: tuple[str, ...]
    shared: int

    @property
    def imbalance(self) -> float:
        """By how much the heaviest piece is above the average: 0.1 is 10 %."""
        return max(self.flops) * len(self.flops) / max(sum(self.flops), 1) - 1

    def __str__(self) -> str:
        """A row for each piece."""
        total = max(sum(self.flops), 1)
        rows = [
            (str(k), f"{f:,}", f"{f / total:.1%}", f"{w:,}", f"{s:,}", source)
            for k, (f, w, s, source) in enumerate(
                zip(self.flops, self.weights, self.sends, self.sources, strict=True)
            )
        ]
        head = ("piece", "FLOPs", "", "bytes of weights", "hands on", "up to")
        return (
            f"{table(head, rows)}\n{self.shared:,} bytes of weights are used by "
            "several pieces and are on every device"
        )


def plan_layers(
    fn: Callable,
    params: Any,
    *args: Any,
    pieces: int,
    crossing: int = 1,
    slack: int | float = 0.02,
    **kwargs: Any,
) -> LayerPlan:
    """Where to cut `fn(params, *args, **kwargs)`. Nothing is computed.

    Args:
        fn: any function that JAX can trace; a loss, if it is to be trained.
        params: its weights, arrays or shapes.
        args, kwargs: the rest, as it will be called with.
        pieces: how many.
        crossing: how many arrays may cross at a cut.
        slack: how much more than in the best balance the heaviest piece may compute,
            as a fraction, to hand on fewer bytes.

    Raises:
        ValueError: there are not enough places where so few arrays cross.
    """
    return _plan(Chain(fn, params, args, kwargs), pieces, crossing, slack)


def _plan(chain: Chain, pieces: int, crossing: int, slack: int | float) -> LayerPlan:
    places = _places(chain.crossings, crossing)
    if len(places) < pieces:
        few = min((c.arrays for c in chain.crossings[:-1]), default=0)
        raise ValueError(
            f"this function can't be cut into {pieces} pieces: there are "
            f"{max(len(places) - 1, 0)} places where {crossing} or fewer arrays cross "
            f"(the fewest anywhere is {few}). Take fewer pieces, or a larger crossing."
        )
    sizes = balance(
        [c.flops for c in places], pieces, [c.bytes for c in places[:-1]], slack
    )
    ends = np.cumsum(sizes) - 1
    return _described(chain, [places[e] for e in ends])


def _places(crossings: Sequence[Crossing], most: int) -> list[Crossing]:
    """Those where few arrays cross, each with all FLOPs since the one before."""
    found, flops = [], 0
    for c in crossings:
        flops += c.flops
        if 0 < c.arrays <= most or c is crossings[-1]:
            found.append(c._replace(flops=flops))
            flops = 0
    return found


def _described(chain: Chain, ends: Sequence[Crossing]) -> LayerPlan:
    places = tuple(c.at for c in ends[:-1])
    pieces, shared = chain.cut(places)
    size = _sizes(chain)
    return LayerPlan(
        places,
        tuple(p.flops for p in pieces),
        tuple(sum(size(w) for w in p.weights) for p in pieces),
        tuple(c.bytes for c in ends),
        tuple(c.source for c in ends),
        sum(size(WeightPart(path)) for path in shared),
    )


def _sizes(chain: Chain) -> Callable[[WeightPart], int]:
    weights = dict(zip(chain.call.weights, chain.call.inputs, strict=True))

    def size(part: WeightPart) -> int:
        arrays = jax.tree.leaves(weights[part.path])
        whole = sum(a.size * a.dtype.itemsize for a in arrays)
        return whole if part.turn is None else whole // arrays[0].shape[0]

    return size


@pytree
class Layered:
    """Weights, or their gradients, laid out for their devices.

    Attributes:
        shared: those that several pieces use, by path.
        pieces: by dtype, (pieces, numbers): what each piece has alone.
    """

    shared: dict[str, Any]
    pieces: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where the arrays of a weight lie in the row of its piece."""

    part: WeightPart
    structure: Any
    arrays: tuple[tuple[str, int, tuple[int, ...]], ...]  # dtype, offset, shape


class LayerParallel:
    """A function whose layers are on different devices; see `layer_parallel`.

    Attributes:
        plan: where it is cut.
    """

    def __init__(
        self, fn: Callable, chain: Chain, plan: LayerPlan, mesh: Mesh, remat: bool
    ):
        """Made by `layer_parallel`."""
        self.plan = plan
        self._fn, self._mesh, self._remat = fn, mesh, remat
        call = chain.call
        pieces, self._shared = chain.cut(plan.places)
        leaves = dict(zip(call.weights, call.inputs, strict=True))
        self._like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call.params
        )
        self._steps = chain.steps
        self._slots, self._lengths = _laid_out(pieces, leaves)
        self._compiled: dict[Any, tuple[Callable, Callable]] = {}

    def split(self, params: Any) -> Layered:
        """The weights as the function takes them."""
        weights = tree.paths(params, is_leaf)
        rows: dict[str, list[list[Array]]] = {}
        for k, slots in enumerate(self._slots):
            for slot in slots:
                value = _part(weights[slot.part.path], slot.part.turn)
                arrays = jax.tree.leaves(value)
                for (name, _, _), a in zip(slot.arrays, arrays, strict=True):
                    row = rows.setdefault(name, [[] for _ in self._slots])
                    row[k].append(jnp.ravel(a))

        def filled(row, length, dtype):
            row = jnp.concatenate([*row, jnp.zeros(0, dtype)])
            return jnp.pad(row, (0, length - row.size))

        return Layered(
            {path: weights[path] for path in self._shared},
            {
                name: jnp.stack([filled(r, self._lengths[name], name) for r in of])
                for name, of in rows.items()
            },
        )

    def join(self, layered: Layered) -> Any:
        """The weights, or gradients, that `split` laid out."""
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._like)
        weights = {**tree.paths(zeros, is_leaf), **layered.shared}
        for k, slots in enumerate(self._slots):
            own = self._unpack(slots, {n: row[k] for n, row in layered.pieces.items()})
            for (path, turn), value in own.items():
                put = lambda a, v, at=turn: v if at is None else a.at[at].set(v)
                weights[path] = jax.tree.map(put, weights[path], value)
        return tree.replaced(zeros, weights, is_leaf)

    def place(self, layered: Layered) -> Layered:
        """The weights on their devices."""
        put = lambda x, spec: jax.device_put(x, NamedSharding(self._mesh, spec))
        return Layered(put(layered.shared, P()), put(layered.pieces, P("pipe")))

    def __call__(self, params: Layered, *args: Any, **kwargs: Any) -> Any:
        """The function, on what `split` made of its weights."""
        flat, structure = jax.tree.flatten((args, kwargs))
        key = structure, *(_kind(x) for x in flat)
        data = [_bare(x) for x in flat if tree.is_array(x)]
        if key not in self._compiled:
            # Kept for later calls, so of tracers the shapes alone.
            like, named = shapes((args, kwargs))
            wraps = [wrap for _, wrap in data]
            self._compiled[key] = self._made_for(like, named, wraps)
        run, out = self._compiled[key]
        return out(run(params.shared, params.pieces, [x for x, _ in data]))

    def _made_for(
        self, args: Any, kwargs: Any, wraps: Sequence[Callable]
    ) -> tuple[Callable, Callable]:
        """The program for operands of these shapes, and what orders its results."""
        chain = Chain(self._fn, self._like, args, kwargs)
        if chain.steps != self._steps:
            raise ValueError(
                f"with these operands the function has {chain.steps} steps, but "
                f"{self._steps} where it was cut. Call layer_parallel with operands "
                "of this kind."
            )
        pieces, _ = chain.cut(self.plan.places)
        for k, (piece, slots) in enumerate(zip(pieces, self._slots, strict=True)):
            held = {slot.part for slot in slots}
            for path in (part.path for part in piece.weights if part not in held):
                raise ValueError(
                    f"with these operands piece {k} uses {path}, which another "
                    "has where it was cut. Call layer_parallel with operands of this "
                    "kind."
                )
        local = jax.shard_map(
            functools.partial(self._local, pieces, wraps),
            mesh=self._mesh,
            in_specs=(P(), P("pipe"), P(), P("pipe")),
            out_specs=P(),
            axis_names={"pipe"},
            check_vma=False,
        )
        # Under jit, where alone some axes may be left to the compiler.
        devices = lambda: jnp.arange(len(pieces))
        run = jax.jit(lambda shared, rows, data: local(shared, rows, data, devices()))
        return run, chain.result

    def _local(
        self,
        pieces: Sequence[Piece],
        wraps: Sequence[Callable],
        shared: Mapping[str, Any],
        rows: Mapping[str, Array],
        data: Sequence[Any],
        device: Array,
    ) -> dict[int, Any]:
        """What one device does: its piece in its turn, and what it hands on."""
        row = {name: r[0] for name, r in rows.items()}
        taken: list[Any] = []
        outs: dict[int, Any] = {}
        for k, (piece, slots) in enumerate(zip(pieces, self._slots, strict=True)):

            def run(row, shared, data, taken, piece=piece, slots=slots):
                whole = [wrap(x) for wrap, x in zip(wraps, data, strict=True)]
                found = piece(self._unpack(slots, row), shared, whole, taken)
                return jax.tree.map(jnp.asarray, found)

            if self._remat:
                run = jax.checkpoint(run)
            like = jax.eval_shape(run, row, shared, data, taken)
            rest = lambda *_, like=like: jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), like
            )
            mine = device[0] == k
            given, made = jax.lax.cond(mine, run, rest, row, shared, data, taken)
            onward = [(k, k + 1)]
            taken = [jax.lax.ppermute(x, "pipe", onward) for x in given]
            for j, x in zip(piece.makes, made, strict=True):
                outs[j] = _sum_over_pipe(x)
        return outs

    def _unpack(
        self, slots: Sequence[_Slot], row: Mapping[str, Array]
    ) -> dict[WeightPart, Any]:
        own = {}
        for slot in slots:
            arrays = [
                row[name][at : at + int(np.prod(shape))].reshape(shape)
                for name, at, shape in slot.arrays
            ]
            own[slot.part] = jax.tree.unflatten(slot.structure, arrays)
        return own


def layer_parallel(
    fn: Callable,
    params: Any,
    *args: Any,
    mesh: Mesh,
    plan: LayerPlan | None = None,
    crossing: int = 1,
    slack: int | float = 0.02,
    remat: bool = True,
    **kwargs: Any,
) -> tuple[LayerParallel, Layered]:
    """The function with its layers on the devices of the axis `pipe`, and its weights.

    It can be jitted and differentiated. Its weights are a `Layered`; `split` makes one,
    `join` turns it, or gradients, back. An elementwise optimizer can work on it.

    Args:
        fn, params, args, kwargs, crossing, slack: as of `plan_layers`.
        mesh: with an axis `pipe`. Others may share the batch.
        plan: in place of one that is made here.
        remat: keep only what pieces hand on, and compute them again for the backward.
            Without it every device has room for what the backward of all pieces needs.

    Raises:
        ValueError: the mesh has no axis `pipe`, there are not enough places to cut, or
            the plan is for another number of devices; or XLA would get the gradient of
            a grouped convolution wrong, see `grouped.py`; when called, if operands make
            another program.
    """
    devices = axis_size(mesh, "pipe")
    check_function(fn, mesh, params, *args, manual={"pipe"}, **kwargs)
    chain = Chain(fn, params, args, kwargs)
    plan = _plan(chain, devices, crossing, slack) if plan is None else plan
    if len(plan.flops) != devices:
        raise ValueError(
            f"the plan has {len(plan.flops)} pieces, but the axis pipe of the mesh "
            f"{devices} devices. Make one of them the other."
        )
    made = LayerParallel(fn, chain, plan, mesh, remat)
    return made, made.place(made.split(params))


def _laid_out(
    pieces: Sequence[Piece], leaves: Mapping[str | None, Any]
) -> tuple[list[list[_Slot]], dict[str, int]]:
    """Where everything lies in the rows, and how long those are."""
    slots: list[list[_Slot]] = []
    lengths: dict[str, int] = {}
    for piece in pieces:
        ends: dict[str, int] = {}
        mine = []
        for part in piece.weights:
            value = jax.eval_shape(
                lambda x, t=part.turn: _part(x, t), leaves[part.path]
            )
            arrays, structure = jax.tree.flatten(value)
            places = []
            for a in arrays:
                name = tree.dtype_name(a.dtype)
                places.append((name, ends.get(name, 0), tuple(a.shape)))
                ends[name] = ends.get(name, 0) + a.size
            mine.append(_Slot(part, structure, tuple(places)))
        slots.append(mine)
        lengths = {n: max(lengths.get(n, 0), ends.get(n, 0)) for n in {*lengths, *ends}}
    return slots, lengths


def _part(value: Any, turn: int | None) -> Any:
    return value if turn is None else jax.tree.map(lambda a: a[turn], value)


def _kind(x: Any) -> Any:
    """What a program is made for: the shape and type of an array, all of the rest."""
    return (x.shape, str(x.dtype)) if tree.is_array(x) else x


def _bare(x: Any) -> tuple[Any, Callable]:
    """An operand, of random keys their numbers, and what makes it of that again."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jr.key_data(x), functools.partial(jr.wrap_key_data, impl=jr.key_impl(x))
    return x, lambda x: x


def _sum_over_pipe(x: Array) -> Array:
    """Of what is zero on all devices but one."""
    if x.dtype == bool:
        return jax.lax.psum(x.astype(jnp.int32), "pipe").astype(bool)
    return jax.lax.psum(x, "pipe")
