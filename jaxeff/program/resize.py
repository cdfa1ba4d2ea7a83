"""Runs a function with smaller weights than it was written for.

The function is traced on the shapes it knows, with whatever batch arrives, and
run again on the small arrays: sizes written into the program (of a reshape, a
broadcast, a slice, the groups of a convolution) follow from the couplings.
Numbers that came from a size, like the 1/N of a mean, stay what they were:

Law: the shrunk function equals the original with the removed indices zeroed.

It needs only how many indices of each coupling stay, not which: so a `Plan` is
a few numbers, and with it a checkpoint of small arrays is a model.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import Bool

from jaxeff import tree

from .call import Call, inner, Rewritten
from .couplings import Couplings
from .dims import Conflict, cut, Dim, expression, find, fix, from_expression, new_size
from .interpret import Interpreter, is_inexact
from .rule import Dims
from .rules import conv_groups, cut_out
from .solve import Solver
from .walk import Where


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which dims of which weights are smaller, and by how much. Plain data.

    Attributes:
        sizes: for each coupling that shrank, (size before, size after).
        dims: for each weight it is part of, what each dim is made of: the name
            of a coupling, a size that stays, or {"cat": [...]}, {"prod": [...]}.
    """

    sizes: dict[str, tuple[int, int]]
    dims: dict[str, list[Any]]

    def to_json(self) -> dict[str, Any]:
        """As lists and dicts, to be written beside a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The reverse of `to_json`."""
        sizes = {k: (int(a), int(b)) for k, (a, b) in data["sizes"].items()}
        return cls(sizes, {k: list(v) for k, v in data["dims"].items()})

    def shape(self, path: str, *, new: bool) -> tuple[int, ...]:
        """The shape of a weight before or after."""
        return tuple(
            new_size(d) if new else find(d).size for d in self._atoms()(self.dims[path])
        )

    def _atoms(self) -> Callable[[list[Any]], list[Dim]]:
        shared = {k: Dim(old, new=new) for k, (old, new) in self.sizes.items()}
        make = lambda e: shared[e] if isinstance(e, str) else Dim(e)
        return lambda dims: [from_expression(e, make) for e in dims]

    def seed(self) -> dict[str, Dims]:
        """The dims of each weight, sharing one atom for each coupling."""
        build = self._atoms()
        return {path: tuple(build(dims)) for path, dims in self.dims.items()}


def make_plan(
    couplings: Couplings,
    keep: Mapping[str, Bool[np.ndarray, " _"]],
    *,
    inexact: bool = False,
) -> Plan:
    """The plan that keeps, of the couplings named, the indices that are True.

    Args:
        couplings: of the program.
        keep: for couplings, by name, which indices stay (True). None at all: what
            the coupling carries is zero, as in a residual block that is left out.
        inexact: allow couplings that are frozen only because the function would not
            stay exactly the same.

    Raises:
        ValueError: a coupling is unknown or frozen, or a mask has the wrong length.
    """
    by_name = {c.name: c for c in couplings}
    sizes = {}
    for name, mask in keep.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=5, cutoff=0.0)
            raise ValueError(
                f"there is no coupling {name!r} among {len(by_name)}. Nearest: "
                f"{', '.join(near)}."
            )
        c = by_name[name]
        if c.frozen and not (inexact and c.inexact):
            raise ValueError(f"coupling {name} is frozen: {c.reason}.")
        if mask.shape != (c.size,):
            raise ValueError(
                f"the mask of coupling {name} has shape {mask.shape}: it needs "
                f"({c.size},), True where an index stays."
            )
        if not mask.all():
            sizes[name] = (c.size, int(mask.sum()))
    names = {find(by_name[n].atom): n for n in sizes}
    describe = lambda atom: names.get(atom, atom.size)
    touched = dict.fromkeys(p for n in sizes for p, _ in by_name[n].members)
    dims = {
        path: [expression(d, describe) for d in couplings.dims[path]]
        for path in touched
    }
    return Plan(sizes, dims)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by `jit`, so by identity
class Resized(Rewritten):
    """A function that runs with the smaller weights of a plan; see `resize`."""

    plan: Plan

    def settings(self) -> dict[str, Any]:
        """The plan."""
        return {"plan": self.plan.to_json()}

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> "Resized":
        """`fn` by a plan that was stored."""
        return cls(fn, Plan.from_json(settings["plan"]))

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn` on the small weights."""
        full = jax.tree_util.tree_map_with_path(self._full, params)
        call = Call(self.fn, full, args, kwargs)
        small = _arrays(params, args, kwargs)
        seeds = self.plan.seed()
        solver, ins = Solver(exact=False), []
        weights = zip(call.weights, call.jaxpr.jaxpr.invars, strict=True)
        for path, v in weights:
            dims = seeds.get(path) if path is not None else None
            if dims is None:
                dims = tuple(Dim(n) for n in v.aval.shape)
                if path is None:
                    dims = tuple(
                        fix(d, lambda: "it is a dim of the inputs") for d in dims
                    )
            ins.append(dims)
        try:
            solver.solve(call.jaxpr, ins)
        except Conflict as e:
            raise ValueError(f"these weights do not fit this function: {e}") from None
        for path, dims, x in zip(call.weights, ins, small, strict=True):
            want = tuple(map(new_size, dims))
            if path is not None and want != tuple(x.shape):
                raise ValueError(
                    f"{path} has shape {tuple(x.shape)}, but by the plan it is {want}: "
                    "these weights are of another shrunk model."
                )
        return call.run(_Resize(solver), small)

    def _full(self, keypath: tuple, x: Any) -> Any:
        path = tree.path_name(keypath)
        if path not in self.plan.dims:
            return x
        return jax.ShapeDtypeStruct(self.plan.shape(path, new=False), x.dtype)


def _arrays(params: Any, args: Sequence[Any], kwargs: dict) -> list[Any]:
    """The arrays among the operands, in the order of `Call.inputs`."""
    return [
        x for x in jax.tree.leaves((params, tuple(args), kwargs)) if tree.is_array(x)
    ]


def resize(fn: Callable, plan: Plan) -> Callable:
    """Makes `fn(params, *args)` run with the smaller weights of `plan`.

    The plan may come from another function of the same weights: shrink the
    evaluation of a model, then train with `resize(training_function, plan)`.

    Raises:
        ValueError: when called, if the weights are not those of the plan, or if
            `fn` uses a dim that shrank in a way that needs its full size.
    """
    return Resized(fn, plan) if plan.sizes else fn


def like(fn: Callable, other: Callable) -> Callable:
    """Runs `other`, a function of the same weights, the way `fn` was made to run.

    `other` is written for the original model; where `fn` is a shrunk or lifted
    version of another of its functions, the result is that version of `other`:
    the training function of a model whose evaluation was compressed. Whether
    removing is exact was found for `fn`: where `other` looks at a dim in a way that
    `fn` does not (a maximum, a position along it), it sees the smaller one.
    """
    made_of = inner(fn)
    if made_of is None:
        return other
    other = like(made_of, other)
    return fn.around(other) if isinstance(fn, Rewritten) else other


class _Resize(Interpreter):
    """Re-runs a program at the sizes a solver found."""

    def __init__(self, solver: Solver):
        super().__init__()
        self.solver = solver
        self._custom: dict[Where, JaxprEqn] = {}  # functions with their own derivative

    def sizes(self, v: Any, where: Where) -> tuple[int, ...]:
        """The shape of a variable in the program being run."""
        return tuple(map(new_size, self.solver.read(v, where)))

    def keeps_types(self, eqn: JaxprEqn, args: list[Any], where: Where) -> bool:
        same = all(
            # A literal is a number without a shape.
            jnp.shape(x) == v.aval.shape
            for x, v in zip(args, eqn.invars, strict=True)
        )
        return same and all(
            self.sizes(v, where[:-1]) == v.aval.shape for v in eqn.outvars
        )

    def run(self, jaxpr: ClosedJaxpr, args: Sequence[Any], where: Where = ()) -> list:
        if where not in self.solver.dims:
            self.solver.solve(jaxpr, self._dims_of(jaxpr, where), where)
        return super().run(jaxpr, args, where)

    def _dims_of(self, jaxpr: ClosedJaxpr, where: Where) -> list[Dims]:
        """The dims of the inputs of a program that the solver did not go through."""
        eqn = self._custom.get(where[:-1])
        if eqn is None:  # of a `shard_map`: nothing shrinks in there
            return [tuple(map(Dim, v.aval.shape)) for v in jaxpr.jaxpr.invars]
        # Of a custom derivative: what is differentiated, then (co)tangents of it.
        other = eqn.invars if where[-1] == "jvp" else eqn.outvars
        copies: dict[Dim, Dim] = {}
        copy = lambda atom: copies.setdefault(atom, Dim(atom.size, new=atom.new))
        return [
            tuple(
                from_expression(expression(d, lambda atom: atom), copy)
                for d in self.solver.read(v, where[:-2])
            )
            for v in (*eqn.invars, *filter(is_inexact, other))
        ]

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list | None:
        if eqn.primitive.name.startswith("custom_"):
            self._custom[where] = eqn
        rule = _SIZES.get(eqn.primitive.name)
        if rule is None or self.keeps_types(eqn, args, where):
            return None
        scope = where[:-1]
        ins = [self.solver.read(v, scope) for v in eqn.invars]
        out = self.sizes(eqn.outvars[0], scope)
        changed = rule(eqn, ins, [self.solver.read(v, scope) for v in eqn.outvars], out)
        if changed.get("feature_group_count") == 0:  # no channel is left to sum over
            return [jnp.zeros(out, eqn.outvars[0].aval.dtype)]
        params = {**eqn.primitive.get_bind_params(eqn.params), **changed}
        with eqn.ctx.manager:
            outs = eqn.primitive.bind(*args, **params)
        return list(outs) if eqn.primitive.multiple_results else [outs]


# How the sizes in an equation's parameters follow. `out` is the new shape.


def _shape(key: str) -> Callable:
    return lambda eqn, ins, outs, out: {key: out}


def _slice(eqn, ins, outs, out) -> dict:
    start, stop = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    for d, x in enumerate(ins[0]):
        strides = eqn.params["strides"]
        if new_size(x) == find(x).size:
            continue
        if strides is not None and strides[d] != 1:  # one in each group: x[1::2]
            stop[d] = new_size(x)
        else:
            pieces = cut_out(x, start[d], stop[d])
            assert pieces is not None, "a slice that cannot be cut fixes the dim"
            start[d] = new_size(pieces[0])
            stop[d] = start[d] + new_size(pieces[1])
    return {"start_indices": tuple(start), "limit_indices": tuple(stop)}


def _split(eqn, ins, outs, out) -> dict:
    axis = eqn.params["axis"]
    return {"sizes": tuple(new_size(dims[axis]) for dims in outs)}


def _pad(eqn, ins, outs, out) -> dict:
    config = list(eqn.params["padding_config"])
    for d, (low, high, between) in enumerate(config):
        x = find(outs[0][d])
        if (low, high, between) != (0, 0, 0) and new_size(x) != x.size:
            first, last = cut(x, int(low)), cut(x, x.size - int(high))
            assert first is not None and last is not None, "padding is a concatenation"
            config[d] = (new_size(first[0]), new_size(last[1]), between)
    return {"padding_config": tuple(config)}


def _gather(eqn, ins, outs, out) -> dict:
    sizes = tuple(
        new_size(x) if n == find(x).size else n
        for n, x in zip(eqn.params["slice_sizes"], ins[0], strict=True)
    )
    return {"slice_sizes": sizes}


def _conv(eqn, ins, outs, out) -> dict:
    if eqn.params["feature_group_count"] == 1:
        return {}
    groups = conv_groups(eqn, ins[0])
    assert groups is not None, "groups that cannot be cut fix the dim"
    return {"feature_group_count": new_size(groups[0])}


_SIZES: dict[str, Callable] = {
    "reshape": _shape("new_sizes"),
    "broadcast_in_dim": _shape("shape"),
    "iota": _shape("shape"),
    "random_bits": lambda eqn, ins, outs, out: {"shape": out[len(ins[0]) :]},
    "rng_bit_generator": lambda eqn, ins, outs, out: {
        "shape": tuple(map(new_size, outs[1]))
    },
    "dynamic_slice": _gather,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "gather": _gather,
    "conv_general_dilated": _conv,
}
