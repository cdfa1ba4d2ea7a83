"""One jitted training step: a loss, an optax optimizer, and what may train.

The step is a pure function of (state, batch). Whatever a technique adds, it adds
to the loss or to the optimizer; the step knows no technique.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxeff.parallelism import (
    averages,
    batch_sharding,
    check_state,
    drifts,
    state_specs,
)
from jaxeff.precision import all_finite
from jaxeff.tree import combine, partition, Patterns, pytree


class Scaler(Protocol):
    """What the step asks of dynamic loss scaling; a scaler is a pytree."""

    def scale(self, loss: Array) -> Array:
        """The loss, large enough that its gradients do not underflow."""

    def unscale(self, grads: PyTree) -> PyTree:
        """The gradients of the loss from those of the scaled loss."""

    def adjust(self, finite: Array) -> "Scaler":
        """The scaler of the next step."""


@pytree
class TrainState:
    """All that a run needs to go on, bit for bit, besides its data.

    Attributes:
        step: how many steps were taken.
        params: of the model; for Linen the whole dict of variables.
        opt_state: of the optimizer, over the weights that train.
        key: of the run; step s draws from `fold_in(key, s)`.
        scaler: dynamic loss scaling, or `None`.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    scaler: Any = None


class Aux(NamedTuple):
    """What a loss returns beside the loss.

    Attributes:
        metrics: scalars to log.
        updates: top-level entries of `params` that replace the old ones, such as
            Linen's `batch_stats`.
    """

    metrics: Mapping[str, Array] = {}
    updates: Mapping[str, PyTree] = {}


Loss = Callable[[PyTree, Any, Array], tuple[Array, Aux]]


def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    trainable: Patterns = "**",
    scaler: Any = None,
) -> TrainState:
    """The state before the first step.

    The step donates its state, so this copies: `params` stay the caller's.

    Args:
        params: to start from.
        tx: the optimizer that the step is made with.
        key: decides dropout, augmentation and whatever else a loss draws.
        trainable: patterns of the weights that train, as the step is made with. A
            Linen model with batch norm trains "params/**".
        scaler: dynamic loss scaling for float16.

    Raises:
        ValueError: a pattern matches no weight.
    """
    train, _ = partition(params, trainable)
    state = TrainState(jnp.zeros([], jnp.int32), params, tx.init(train), key, scaler)
    return jax.tree.map(jnp.copy, state)


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    trainable: Patterns = "**",
    view: Callable[[PyTree, PyTree], PyTree] | None = None,
    accumulate: int = 1,
    per_device: Mesh | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch) -> (state, metrics)`, jitted; the old state is donated.

    With a scaler in the state, a step whose gradients are not all finite changes
    nothing but the scaler and the count of steps, and its metric `skipped` is True.

    Args:
        loss: `loss(params, batch, key) -> (scalar, Aux)`.
        tx: the optimizer.
        trainable: patterns of the weights that train; the others, and all that is
            not floating-point, are constants to `grad` and never reach `tx`.
        view: `view(params, opt_state) -> params`, what the loss sees of the weights
            that train; `grad` goes through it. `pruning.masked` shows what masks in
            the optimizer state leave.
        accumulate: parts of a batch that are computed one after another, for less
            memory; the mean of their gradients is that of the batch, if the loss is a
            mean. Part i of k has the examples i, i + k, i + 2 k ...; what the loss
            updates it updates k times. Devices that share the batch add their
            gradients up once for each part, but with `per_device` once.
        per_device: a mesh; each device of its axis data computes the gradient of its
            own part of the batch, draws its own random numbers, and leaves it to `tx`
            to average (`parallelism.rounded`, `powersgd`, `average`), before anything
            else in it keeps a state. Statistics of a batch are those of each device's
            part; metrics and updates are averaged, of integers the largest is taken,
            of random keys that of the first device.

    Returns:
        The step. Its metrics are `loss` and what the loss puts into `Aux`.

    Raises:
        ValueError: a batch has no parts; while tracing, where the batch does not divide
            into its parts, where the loss returns something else, or
            updates an entry that `params` does not have; or with `per_device`, where
            nothing in `tx` averages, or the batch does not divide.
    """

    if accumulate < 1:
        raise ValueError(f"a batch has 1 part or more, got accumulate={accumulate}.")

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        train, frozen = partition(state.params, trainable)
        key = jr.fold_in(state.key, state.step)
        if per_device is not None:
            key = jr.fold_in(key, jax.lax.axis_index("data"))

        def objective(train, frozen, batch, key):
            seen = train if view is None else view(train, state.opt_state)
            value, aux = checked(loss(combine(seen, frozen), batch, key))
            scaled = value if state.scaler is None else state.scaler.scale(value)
            return scaled, (value, aux)

        gradient = jax.grad(objective, has_aux=True)
        if accumulate == 1:
            grads, (value, aux) = gradient(train, frozen, batch, key)
        else:
            grads, (value, aux) = _in_parts(
                gradient, accumulate, state.params, trainable, batch, key
            )
        if per_device is not None:
            value, aux = jax.tree.map(_over_devices, (value, aux))
        if state.scaler is not None:
            grads = state.scaler.unscale(grads)
        updates, opt_state = tx.update(grads, state.opt_state, train)
        train = optax.apply_updates(train, updates)
        params = replaced_entries(combine(train, frozen), aux.updates)
        metrics = {"loss": value, **aux.metrics}
        scaler = state.scaler
        if scaler is not None:
            finite = all_finite(grads)
            if per_device is not None:  # all skip the step, or none
                finite = jax.lax.pmin(finite.astype(jnp.int32), "data") > 0
            keep = lambda new, old: jnp.where(finite, new, old)
            params = jax.tree.map(keep, params, state.params)
            opt_state = jax.tree.map(keep, opt_state, state.opt_state)
            scaler = scaler.adjust(finite)
            metrics["skipped"] = ~finite
        new = TrainState(state.step + 1, params, opt_state, state.key, scaler)
        return new, metrics

    if per_device is not None:
        step = _spread(step, per_device, view is not None)
    return jax.jit(step, donate_argnums=0)


def _in_parts(
    gradient: Callable,
    parts: int,
    params: PyTree,
    trainable: Patterns,
    batch: Any,
    key: Any,
) -> tuple[PyTree, tuple[Array, Aux]]:
    """The mean of the gradients of the parts of a batch, one after another."""

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(
                f"a batch divides into its parts, but {x.shape[0]} examples (of a "
                f"device, with per_device) do not into accumulate={parts}."
            )
        # Interleaved: where devices share the batch, each has a share of every part.
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    rows = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], rows)
    train, frozen = partition(params, trainable)
    updates = jax.eval_shape(gradient, train, frozen, first, key)[1][1].updates
    replaced_entries(params, updates)  # or what does not fit would fail in the scan
    # What one part updates, such as running averages, the next one goes on from.
    changing = {name: params[name] for name in updates}

    def one(carry, part):
        grads, changing, i = carry
        halves = partition(replaced_entries(params, changing), trainable)
        new, (value, aux) = gradient(*halves, part, jr.fold_in(key, i))
        grads = jax.tree.map(lambda sum_, g: sum_ + g.astype(sum_.dtype), grads, new)
        seen = replaced_entries(params, aux.updates)
        changing = {name: seen[name] for name in changing}
        return (grads, changing, i + 1), (value, aux.metrics)

    # fp32: each of many bf16 sums drops what is below 1/256 of it.
    wide = lambda dtype: jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=wide(w.dtype)), train)
    begin = zeros, changing, 0
    (grads, changing, _), (values, metrics) = jax.lax.scan(one, begin, rows)
    grads = jax.tree.map(lambda g, w: (g / parts).astype(w.dtype), grads, train)
    return grads, (values.mean(), Aux(jax.tree.map(_over_parts, metrics), changing))


def _over_parts(x: Array) -> Array:
    return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x.max(0)


def _over_devices(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.pmean(x, "data")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # which no arithmetic may touch
        numbers = jax.lax.all_gather(jr.key_data(x), "data")[0]
        return jr.wrap_key_data(numbers, impl=jr.key_impl(x))
    numbers = x.astype(jnp.int32) if x.dtype == bool else x
    return jax.lax.pmax(numbers, "data").astype(x.dtype)


def _spread(step: Callable, mesh: Mesh, viewed: bool) -> Callable:
    """The step on each device's part of the batch."""

    def spread(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        if not averages(state.opt_state):
            raise ValueError(
                "with per_device every device has a gradient of its own, and nothing "
                "in tx averages them. Begin it with parallelism.average(devices=...), "
                "or with one that also compresses."
            )
        check_state(state.opt_state, mesh.shape["data"])
        if drifts(state.opt_state) and not viewed:
            raise ValueError(
                "with diloco each device has weights of its own, and the loss sees "
                "those that all agreed on last. Give view=parallelism.local_weights."
            )
        for x in jax.tree.leaves(batch):
            if jnp.ndim(x) == 0:
                raise ValueError(
                    "devices share a batch along its first dim, and a number in it has "
                    "none. Leave it out, or repeat it for each example."
                )
            batch_sharding(mesh, x.shape[0])
        # By field: a `TrainState` of specs would be none of arrays.
        names = [f.name for f in dataclasses.fields(state)]
        parts = [getattr(state, name) for name in names]
        specs = [P()] * len(names)
        specs[names.index("opt_state")] = state_specs(state.opt_state)

        def local(parts, batch):
            new, metrics = step(TrainState(*parts), batch)
            return [getattr(new, name) for name in names], metrics

        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=(specs, P()),
            axis_names={"data"},
            check_vma=False,
        )
        parts, metrics = run(parts, batch)
        return TrainState(*parts), metrics

    return spread


def checked(result: Any) -> tuple[Float[Array, ""], Aux]:
    """What a loss returned, if it is what a loss returns."""
    match result:
        case (value, Aux() as aux) if jnp.shape(value) == ():
            return value, aux
    raise ValueError(
        "a loss returns (scalar, Aux(metrics={...}, updates={...})), but this one "
        f"returned {jax.tree.map(jnp.shape, result)} (shapes). Average over the batch, "
        "and return Aux() where there is nothing else to say."
    )


def replaced_entries(params: Any, updates: Mapping[str, PyTree]) -> Any:
    """`params` with the entries that a loss updates, in the structure that they had.

    Raises:
        ValueError: it has no such entry, or one of another form.
    """
    if not updates:
        return params
    known = list(params) if isinstance(params, Mapping) else []
    if unknown := [name for name in updates if name not in known]:
        raise ValueError(
            f"updates replace top-level entries of params, which has {known}, but the "
            f"loss updates {unknown}. Put them into params before the first step."
        )
    # A changed dtype or shape would silently compile the next step anew; so would a
    # `dict` in the place of a `FrozenDict`.
    entries = dict(params)
    for name, new in updates.items():
        if _form(new) != _form(params[name]):
            raise ValueError(
                f"an update has the structure, shapes and dtypes of the entry it "
                f"replaces, but the loss turns {name} from {_form(params[name])} into "
                f"{_form(new)}."
            )
        structure = jax.tree.structure(params[name])
        entries[name] = jax.tree.unflatten(structure, jax.tree.leaves(new))
    return type(params)(entries)


def _form(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
