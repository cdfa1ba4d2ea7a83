"""Pipeline parallelism: a schedule's table, run by one program on all devices.

    cut = Stages(one_f_one_b(devices=4, microbatches=16), layers=24)
    run = pipeline(embed, block, head, cut, mesh)
    params = Pipelined(ends, cut.split(blocks))
    loss, grads = run(params, batch)          # grads like params

Every device goes through the rows of the table with a `scan`. What it keeps for later
has as many places as are in use at a time, so with 1F1B memory does not grow with the
number of microbatches.

The axes `pipe` and `data` are run by hand, so gradients are summed once, at the end;
the others stay with the compiler, and a stage may be sharded over them.

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Int, PyTree

from jaxeff.program import halves, trace
from jaxeff.tree import paths, pytree

from .balance import balance
from .grouped import check_function
from .schedules import Schedule
from .tables import KINDS, make_table, Row


@pytree
class Pipelined:
    """Weights, or their gradients, as a pipeline takes them.

    Attributes:
        ends: what `embed` and `head` use. They are on every device, so a tied
            embedding is one weight.
        stages: from `Stages.split`.
    """

    ends: PyTree
    stages: PyTree


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which layers are in which stage of a schedule.

    Attributes:
        schedule: how many stages there are, and on which device.
        layers: of each stage; a number is shared out evenly, the first with more.

    Raises:
        ValueError: a stage would have no layer, or there are not as many numbers as
            stages.
    """

    schedule: Schedule
    layers: Sequence[int] | np.ndarray | int

    def __post_init__(self):
        stages = self.schedule.stages
        given = np.asarray(self.layers)
        if given.ndim:
            layers = tuple(map(int, given))
        else:
            less, more = divmod(int(given), stages)
            layers = tuple(less + (k < more) for k in range(stages))
        object.__setattr__(self, "layers", layers)
        if len(self.sizes) != stages or min(self.sizes) < 1:
            raise ValueError(
                f"each of the {stages} stages has 1 layer or more, got {self.sizes}. "
                "Give a number for each, or at least as many layers as stages."
            )

    @classmethod
    def balanced(
        cls,
        schedule: Schedule,
        embed: Callable,
        block: Callable,
        head: Callable,
        ends: PyTree,
        blocks: PyTree,
        batch: Any,
        key: Any = None,
    ) -> "Stages":
        """As many layers for each stage as make the heaviest as light as can be.

        The first stage has the embedding too, and the last the head. All take the time
        of the heaviest, as each tick of a schedule does. FLOPs are counted on the trace
        of one layer; nothing is computed, and arrays may be given as shapes.

        Args:
            schedule: with its number of stages.
            embed, block, head, ends, batch, key: as of `pipeline`.
            blocks: stacked layers, (layers, ...) each.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), blocks)
        layers = jax.tree.leaves(blocks)[0].shape[0]
        x = jax.eval_shape(embed, ends, batch, key)
        cost = lambda fn, *given: trace(fn, *given).costs.flops
        costs = [cost(block, one, x, key)] * layers
        costs[0] += cost(embed, ends, batch, key)
        costs[-1] += cost(head, ends, x, batch)
        return cls(schedule, balance(costs, schedule.stages))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each stage."""
        assert isinstance(self.layers, tuple)
        return self.layers

    def split(self, blocks: PyTree) -> PyTree:
        """Stacked layers, (layers, ...) each, as (devices, chunks, most layers, ...).

        Shorter stages are filled up with a layer's copy, which is not used and whose
        gradient is zero.

        Raises:
            ValueError: there are not as many layers as the stages have.
        """
        at, _ = self._places()

        def cut(a):
            if a.shape[0] != sum(self.sizes):
                raise ValueError(
                    f"the stages have {sum(self.sizes)} layers in all, but an array of "
                    f"shape {a.shape} has {a.shape[0]}."
                )
            return a[at]

        return jax.tree.map(cut, blocks)

    def join(self, stages: PyTree) -> PyTree:
        """The stacked layers that `split` took apart."""
        at, used = self._places()
        order = np.argsort(at[used])
        return jax.tree.map(lambda a: a[used][order], stages)

    def place(self, params: Pipelined, mesh: Mesh) -> Pipelined:
        """The weights on their devices: each has its stages, and the ends."""
        whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("pipe"))
        return Pipelined(
            jax.device_put(params.ends, whole), jax.device_put(params.stages, parts)
        )

    def _places(self) -> tuple[Int[np.ndarray, "p v n"], Bool[np.ndarray, "p v n"]]:
        """Which layer is where, and which places are used."""
        s = self.schedule
        first = np.cumsum([0, *self.sizes[:-1]]).reshape(s.chunks, s.devices).T
        size = np.array(self.sizes).reshape(s.chunks, s.devices).T
        n = np.arange(size.max())
        used = n < size[..., None]
        return np.where(used, first[..., None] + n, 0), used


def pipeline(
    embed: Callable[[PyTree, Any, Any], Array],
    block: Callable[[PyTree, Array, Any], Array],
    head: Callable[[PyTree, Array, Any], Array],
    stages: Stages,
    mesh: Mesh,
    *,
    remat: bool | None = None,
) -> jax.stages.Wrapped:
    """`run(params, batch, key=None) -> (loss, gradients)`, over all devices of a mesh.

    The loss is a mean over microbatches, which are equally large: microbatch n holds
    the examples n, n + m, n + 2 m, ... Random keys differ between microbatches, layers
    and places on the axis data; `key_of` gives the same elsewhere.

    Args:
        embed: `embed(ends, microbatch, key) -> x`, before the first layer.
        block: `block(weights, x, key) -> x`, one layer.
        head: `head(ends, x, microbatch) -> loss`, a mean over the microbatch.
        stages: which layers are where, and the schedule.
        mesh: with as many devices on its axis `pipe` as the schedule has.
        remat: keep only the inputs of stages and compute them again for the backward.
            True by default; not for schedules that cut the backward in two. (Nor does
            `jax.checkpoint` inside of `block` leave them anything to put off.)

    Raises:
        ValueError: mesh and schedule do not fit together; while tracing, where weights
            are not as `stages` splits them or not floating, the batch does not divide
            into microbatches, x is no array, a layer changes it, or a loss is no
            number.
    """
    s = stages.schedule
    if (have := mesh.shape.get("pipe", 1)) != s.devices:
        raise ValueError(
            f"the schedule is for {s.devices} devices, but the axis pipe of the mesh "
            f"has {have}. Make one of them the other."
        )
    in_two = any(op.kind == "W" for op in s.operations())
    if in_two and remat:
        raise ValueError(
            f"{s.name} cuts a backward in two, and what is computed again can't be: "
            "all would be in the first part. Leave remat out, or take 1F1B."
        )
    model = _Model(embed, block, head, not in_two if remat is None else remat, in_two)
    manual = tuple(name for name in ("pipe", "data") if name in mesh.axis_names)

    def run(params: Any, batch: Any, key: Any = None) -> tuple[Array, Pipelined]:
        if not isinstance(params, Pipelined):
            raise ValueError(
                f"a pipeline takes its weights as Pipelined(ends, stages), but these "
                f"are a {type(params).__name__}. Make them with Stages.split."
            )
        places = s.devices, s.chunks, max(stages.sizes)
        for path, w in paths(params.stages).items():
            if w.shape[:3] != places:
                raise ValueError(
                    f"the weights of stages have the first dims (devices, chunks, most "
                    f"layers) = {places}, but {path} has the shape {w.shape}. Split "
                    "them with the Stages of this pipeline."
                )
        shards = mesh.shape.get("data", 1)
        shapes = {jnp.shape(x) for x in jax.tree.leaves(batch)}
        examples = {shape[0] if shape else 0 for shape in shapes}
        if len(examples) != 1 or (n := examples.pop()) < 1:
            raise ValueError(
                "all arrays of a batch have the same first dim, of 1 example or more, "
                f"but these have the shapes {sorted(shapes)}."
            )
        if n % (s.microbatches * shards):
            raise ValueError(
                f"a batch divides into {s.microbatches} microbatches, each over "
                f"{shards} devices, but this one has {n} examples. Choose a multiple "
                f"of {s.microbatches * shards}."
            )
        for path, w in paths(params).items():
            if not jnp.issubdtype(w.dtype, jnp.floating):
                raise ValueError(
                    f"a pipeline returns the gradient of every weight, but {path} is "
                    f"{w.dtype}, which has none. Leave it out of the weights."
                )
        part = lambda x: jax.ShapeDtypeStruct(
            (n // s.microbatches // shards, *x.shape[1:]), x.dtype
        )
        layer = lambda w: jax.ShapeDtypeStruct(w.shape[len(places) :], w.dtype)
        check_function(
            functools.partial(_one_layer, model),
            mesh,
            Pipelined(params.ends, jax.tree.map(layer, params.stages)),
            jax.tree.map(part, batch),
            key,
            manual=manual,
        )
        data = None if key is None else jr.key_data(key)
        wrap = functools.partial(
            jr.wrap_key_data, impl=None if key is None else jr.key_impl(key)
        )

        def local(ends, blocks, batch, data, device, shard):
            loss, of_ends, of_blocks = _run(
                model, stages, ends, blocks, batch, data, wrap, device[0], shard[0]
            )
            loss = jax.lax.psum(loss, "pipe")
            of_ends = jax.lax.psum(of_ends, "pipe")
            if "data" in manual:
                loss, of_ends, of_blocks = jax.lax.pmean(
                    (loss, of_ends, of_blocks), "data"
                )
            return loss, Pipelined(of_ends, of_blocks)

        parts, whole = P("pipe"), P()
        rows = P("data") if "data" in manual else P()
        loss, grads = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, parts, rows, whole, parts, rows),
            out_specs=(whole, Pipelined(whole, parts)),
            axis_names={*manual},
            check_vma=False,
        )(
            params.ends,
            params.stages,
            batch,
            data,
            jnp.arange(s.devices),
            jnp.arange(shards),
        )
        like = lambda g, w: g.astype(w.dtype)
        return loss, jax.tree.map(like, grads, params)

    return jax.jit(run)


def key_of(key: Any, microbatch: Any, layer: Any, shard: Any = 0) -> Any:
    """The random key of a layer for a microbatch; layer -1 is the embedding.

    `shard` is the place on the axis data, of which each draws for its own examples.
    """
    return jr.fold_in(jr.fold_in(jr.fold_in(key, shard), microbatch), layer + 1)


class _Model(NamedTuple):
    """The user's functions, and how a stage keeps what its backward needs."""

    embed: Callable
    block: Callable
    head: Callable
    remat: bool
    in_two: bool  # the backward is


def _one_layer(model: _Model, params: Pipelined, batch: Any, key: Any) -> Array:
    """A model of one layer, in which all kinds of operations are."""
    x = model.block(params.stages, model.embed(params.ends, batch, key), key)
    return model.head(params.ends, x, batch)


class _State(NamedTuple):
    """What a device carries from lane to lane; of waiting things, all places."""

    inputs: Array
    cotangents: Array
    kept: list[Array]
    handed: list[Array]
    of_ends: PyTree
    of_blocks: PyTree
    loss: Array


def _run(
    model: _Model,
    cut: Stages,
    ends: PyTree,
    blocks: PyTree,
    batch: PyTree,
    key: Array | None,
    wrap: Callable[[Array], Any],
    device: Int[Array, ""],
    shard: Int[Array, ""],
) -> tuple[Array, PyTree, PyTree]:
    """The table as one device runs it: its part of the loss and of the gradients."""
    schedule, table = cut.schedule, make_table(cut.schedule)
    p, m, last = schedule.devices, schedule.microbatches, schedule.stages - 1
    first_layer = jnp.asarray(np.cumsum([0, *cut.sizes[:-1]]))
    layers = jnp.asarray(cut.sizes)
    own = jax.tree.map(lambda a: a[0], blocks)  # (chunks, layers, ...)
    most = max(cut.sizes)
    uneven = min(cut.sizes) < most

    def seed(n, layer):
        if key is None:
            return None
        return key_of(wrap(key), n, layer, shard)

    def stage(weights, x, given):
        n, first, count = given
        start = x

        def layer(x, of):
            at, w = of
            if not uneven:
                return run(w, x, at)
            # A short stage fills up with its first layer again, on what that was given:
            # where the model is finite, so is what is left out here, and its gradient.
            used = at < count
            y = run(w, jnp.where(used, x, start), jnp.where(used, at, 0))
            return jnp.where(used, y, x)

        def run(w, x, at):
            y = model.block(w, x, seed(n, first + at))
            if (y.shape, y.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"a layer of a pipeline gives what the next one takes, but block "
                    f"turns {x.dtype}{list(x.shape)} into {y.dtype}{list(y.shape)}."
                )
            return y

        if model.remat:
            return jax.lax.scan(
                lambda x, of: (layer(x, of), None), x, (jnp.arange(most), weights)
            )[0]
        # Each layer for itself: a scan's backward can't be cut in two, and a scan keeps
        # the cast of a weight with what hangs on the data.
        for at in range(most):
            x = layer(x, (at, jax.tree.map(lambda a, at=at: a[at], weights)))
        return x

    def microbatch(n):
        pick = lambda a: a.reshape(-1, m, *a.shape[1:])[:, n]
        return jax.tree.map(pick, batch)

    def given(row):
        k = row.chunk * p + device
        return row.microbatch, first_layer[k], layers[k]

    embedded = lambda ends, n: model.embed(ends, microbatch(n), seed(n, -1))
    x = jax.eval_shape(embedded, ends, jnp.int32(0))
    if not isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"stages hand on one array, but embed gives a {type(x).__name__}. Join "
            "what it holds, as along the last dim."
        )
    loss = jax.eval_shape(
        lambda x, n: model.head(ends, x, microbatch(n)), x, jnp.int32(0)
    )
    if jnp.shape(loss) != ():
        raise ValueError(
            f"head gives the loss of a microbatch, a number, but this has the shape "
            f"{jnp.shape(loss)}. Take the mean."
        )
    zero = jnp.zeros(x.shape, x.dtype)
    chunk = jax.tree.map(lambda a: a[0], own)
    integer = jnp.int32(0)
    half = halves(
        jax.checkpoint(stage) if model.remat else stage,
        chunk,
        x,
        (integer, first_layer[0], layers[0]),
    )

    wide = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
    rooms = lambda count, s: jnp.zeros((count, *s.shape), s.dtype)
    places = table.places
    state = _State(
        rooms(places.input, x),
        rooms(places.cotangent, x),
        [rooms(places.kept, s) for s in half.kept],
        [rooms(places.handed, s) for s in half.handed if model.in_two],
        jax.tree.map(wide, ends),
        jax.tree.map(wide, own),
        jnp.zeros([], jnp.float32),
    )

    def weights(row):
        if not uneven:
            return jax.tree.map(lambda a: a[row.chunk], own)
        # Not the copies in the weights: they don't train with the layer.
        at, count = jnp.arange(most), layers[row.chunk * p + device]
        at = jnp.where(at < count, at, 0)
        return jax.tree.map(lambda a: a[row.chunk, at], own)

    def put(rooms, at, values):
        return [r.at[at].set(v) for r, v in zip(rooms, values, strict=True)]

    def forward(row, state):
        n, is_first = row.microbatch, row.chunk * p + device == 0
        x = jax.lax.cond(
            is_first, lambda: embedded(ends, n), lambda: state.inputs[row.input]
        )
        y, kept = half.forward(weights(row), x, given(row))
        state = state._replace(
            kept=put(state.kept, row.kept, kept),
            cotangents=state.cotangents.at[row.own].set(y, mode="drop"),
        )
        return state, y, zero

    def of_result(row, state):
        """The gradient of a stage's result; the last one's comes from the head."""

        def top(state, y):
            loss, (of_ends, g) = jax.value_and_grad(
                lambda ends, y: model.head(ends, y, microbatch(row.microbatch)) / m,
                argnums=(0, 1),
            )(ends, y)
            of_ends = jax.tree.map(jnp.add, state.of_ends, of_ends)
            return state._replace(
                of_ends=of_ends, loss=state.loss + loss.astype(jnp.float32)
            ), g

        here = state.cotangents[row.cotangent]
        is_last = row.chunk * p + device == last
        return jax.lax.cond(is_last, top, lambda state, g: (state, g), state, here)

    def to_embedding(row, state, g):
        def bottom(state):
            back = jax.vjp(lambda ends: embedded(ends, row.microbatch), ends)[1]
            of_ends = jax.tree.map(jnp.add, state.of_ends, back(g)[0])
            return state._replace(of_ends=of_ends)

        is_first = row.chunk * p + device == 0
        return jax.lax.cond(is_first, bottom, lambda state: state, state)

    def add(row, state, grads):
        put = lambda total, g: total.at[row.chunk].add(g)
        return state._replace(of_blocks=jax.tree.map(put, state.of_blocks, grads))

    def backward(row, state):
        state, g = of_result(row, state)
        kept = [r[row.kept] for r in state.kept]
        of_weights, g = half.backward(weights(row), kept, g)
        state = add(row, to_embedding(row, state, g), of_weights)
        return state, zero, g

    def of_input(row, state):
        state, g = of_result(row, state)
        kept = [r[row.kept] for r in state.kept]
        g, handed = half.of_input(weights(row), kept, g)
        state = to_embedding(row, state, g)
        return state._replace(handed=put(state.handed, row.handed, handed)), zero, g

    def of_weights(row, state):
        kept = [r[row.kept] for r in state.kept]
        handed = [r[row.handed] for r in state.handed]
        grads = half.of_weights(weights(row), kept, handed)
        return add(row, state, grads), zero, zero

    runs = {"F": forward, "B": backward, "I": of_input, "W": of_weights}
    up = [(d, (d + 1) % p) for d in range(p if schedule.chunks > 1 else p - 1)]
    down = [(to, d) for d, to in up]

    def lane(state, row, what):
        idle = lambda row, state: (state, zero, zero)
        branches = [idle, *(runs[kind] for kind in what.kinds)]
        branch = jnp.array([0, *(what.kinds.find(kind) + 1 for kind in KINDS)])
        state, y, g = jax.lax.switch(branch[row.kind], branches, row, state)
        if what.sends_inputs:
            came = jax.lax.ppermute(y, "pipe", up)
            inputs = state.inputs.at[row.came_input].set(came, mode="drop")
            state = state._replace(inputs=inputs)
        if what.sends_cotangents:
            came = jax.lax.ppermute(g, "pipe", down)
            cotangents = state.cotangents.at[row.came_cotangent].set(came, mode="drop")
            state = state._replace(cotangents=cotangents)
        return state

    for begin, end, lanes in table.segments():

        def tick(state, rows, lanes=lanes):
            for at, what in enumerate(lanes):
                mine = Row(*(a[at, device] for a in rows))
                state = lane(state, mine, what)
            return state, None

        rows = jax.tree.map(lambda a, b=begin, e=end: jnp.asarray(a[b:e]), table.rows)
        state, _ = jax.lax.scan(tick, state, rows)
    of_blocks = jax.tree.map(lambda a: a[None], state.of_blocks)
    return state.loss, state.of_ends, of_blocks
