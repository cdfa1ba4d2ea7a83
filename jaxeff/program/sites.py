"""Sites: where each weight meets data, and which of its dims do what there.

A weight is followed through the operations that only change how it is seen
(transpose, reshape, cast, the slices a `scan` takes) to the `dot_general`,
convolution or look-up that uses it. Nothing is said by name: a `DenseGeneral`
that flattens its kernel and an `einsum` over the same kernel are the same site.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from .flops import equation_flops
from .leaf import Conv, dot_of, lookup_dim
from .source import inside, source_line
from .walk import bodies, Body, equations, product, scan_counts, Where


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an array is a view of: a weight, and the weight's dims in each of its own.

    A dim that a reshape cut out of a larger one names that larger one.
    """

    path: str
    dims: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one weight by one operation.

    `contract`, `output` and `batch` are dims of the weight as it stands in the
    tree. `batch` holds the rest: the dims a scan takes slices along, the batch
    dims of a product, the rows of a look-up.
    """

    path: str
    primitive: str  # dot_general, conv_general_dilated or gather
    where: Where
    weight: int  # which operand of the equation is the weight
    contract: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...]
    times: int | None  # how often it runs; None: unknown, inside a while
    flops: int  # a multiply-add is 2; all runs together (an unknown number is 1)
    bytes: int  # operands read once, result written once; all runs together
    source: str

    @property
    def name(self) -> str:
        """A name for what is observed at this site, unique in its program."""
        return ".".join(map(str, self.where)) + f":{self.weight}"


Visit = Callable[[Where, JaxprEqn, list[Origin | None], int | None], None]


def follow(
    jaxpr: ClosedJaxpr,
    origins: Sequence[Origin | None],
    visit: Visit,
    where: Where = (),
    times: int | None = 1,
) -> list[Origin | None]:
    """Calls `visit` at each equation with what its operands are views of."""
    env: dict[Var, Origin | None] = dict(zip(jaxpr.jaxpr.invars, origins, strict=True))
    read = lambda v: None if isinstance(v, Literal) else env.get(v)
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        given, here = [read(v) for v in eqn.invars], (*where, i)
        visit(here, eqn, given, times)
        view = _VIEWS.get(eqn.primitive.name)
        if view is not None and given[0] is not None:
            env.update(dict.fromkeys(eqn.outvars, view(eqn, given[0])))
        if eqn.primitive.name in ("stack", "concatenate"):
            env.update(dict.fromkeys(eqn.outvars, _joined(eqn, given)))
        if eqn.primitive.name == "optimization_barrier":  # each passes through
            env.update(zip(eqn.outvars, given, strict=True))
        for body in bodies(eqn, here):
            entering = [given[j] for j in body.operands]
            entering = _entering(body, eqn, entering)
            inner = product(times, body.times)
            with inside(eqn):
                leaving = follow(body.jaxpr, entering, visit, body.where, inner)
            if body.kind == "call":
                env.update(zip(eqn.outvars, leaving, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _entering(
    body: Body, eqn: JaxprEqn, given: list[Origin | None]
) -> list[Origin | None]:
    """What the inputs of a body are views of: what a loop carries is no weight."""
    if body.kind in ("call", "cond"):
        return given
    if body.kind == "shard_map":  # a device sees a part only
        return [None] * len(given)
    consts, carry = len(given) - len(eqn.outvars), len(eqn.outvars)
    if body.kind == "scan":
        consts, carry = scan_counts(eqn)
    out: list[Origin | None] = []
    for j, origin in enumerate(given):
        if origin is not None and j in body.stacked:
            origin = Origin(origin.path, origin.dims[1:])
        out.append(None if consts <= j < consts + carry else origin)
    return out


def _same(eqn: JaxprEqn, o: Origin) -> Origin:
    return o


def _bits(eqn: JaxprEqn, o: Origin) -> Origin | None:
    """Integers shifted by a number, or their bits as integers of the same width."""
    numbers = all(isinstance(v, Literal) for v in eqn.invars[1:])
    same = eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape
    return o if numbers and same else None


def _joined(eqn: JaxprEqn, given: Sequence[Origin | None]) -> Origin | None:
    """Pieces of one weight of integers put together: how packed ones are unpacked."""
    first, dtype = given[0], eqn.outvars[0].aval.dtype
    if first is None or any(o != first for o in given) or dtype.kind not in "iu":
        return None
    if eqn.primitive.name == "concatenate":
        return first
    axis = eqn.params["axis"]
    return Origin(first.path, (*first.dims[:axis], (), *first.dims[axis:]))


def _transpose(eqn: JaxprEqn, o: Origin) -> Origin:
    return Origin(o.path, tuple(o.dims[d] for d in eqn.params["permutation"]))


def _squeeze(eqn: JaxprEqn, o: Origin) -> Origin:
    gone = eqn.params["dimensions"]
    return Origin(o.path, tuple(x for d, x in enumerate(o.dims) if d not in gone))


def _unstack(eqn: JaxprEqn, o: Origin) -> Origin:
    axis = eqn.params["axis"]
    return Origin(o.path, (*o.dims[:axis], *o.dims[axis + 1 :]))


def _broadcast(eqn: JaxprEqn, o: Origin) -> Origin:
    dims: list[tuple[int, ...]] = [()] * len(eqn.params["shape"])
    for d, x in zip(eqn.params["broadcast_dimensions"], o.dims, strict=True):
        dims[d] = x
    return Origin(o.path, tuple(dims))


def _reshape(eqn: JaxprEqn, o: Origin) -> Origin:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    dims: list[tuple[int, ...]] = [()] * len(new)
    for olds, news in reshape_groups(old, new):
        joined = tuple(dict.fromkeys(x for d in olds for x in o.dims[d]))
        for d in news:
            dims[d] = joined if new[d] > 1 or len(news) == 1 else ()
    return Origin(o.path, tuple(dims))


_VIEWS: dict[str, Callable[[JaxprEqn, Origin], Origin | None]] = {
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "reduce_precision": _same,
    "rev": _same,
    "bitcast_convert_type": _bits,
    "shift_left": _bits,
    "shift_right_arithmetic": _bits,
    "shift_right_logical": _bits,
    "and": _bits,
    "slice": _same,
    "split": _same,
    "dynamic_slice": _same,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "unstack": _unstack,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dims of equal product that a reshape turns into each other.

    (6, 4, 5) -> (2, 3, 20) is [([0], [0, 1]), ([1, 2], [2])].
    """
    if 0 in old:  # no run of dims can be told from another
        return [(list(range(len(old))), list(range(len(new))))]
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        if i < len(old):
            olds, a, i = [i], old[i], i + 1
        if j < len(new):
            news, b, j = [j], new[j], j + 1
        while a != b:
            if (a < b and i < len(old)) or j == len(new):
                olds, a, i = [*olds, i], a * old[i], i + 1
            else:
                news, b, j = [*news, j], b * new[j], j + 1
        groups.append((olds, news))
    return groups


def find_sites(jaxpr: ClosedJaxpr, weights: Sequence[Any]) -> list[Site]:
    """Every site of a traced program, in the order they run.

    Args:
        jaxpr: the program.
        weights: for each of its inputs the weight's path, or None for data.
    """
    sites: list[Site] = []
    shapes = {
        path: v.aval.shape
        for path, v in zip(weights, jaxpr.jaxpr.invars, strict=True)
        if path is not None
    }

    alive = {where for where, _, _ in equations(jaxpr)}

    def visit(where, eqn, origins, times):
        if where not in alive:
            return  # nothing depends on it
        for operand, origin in enumerate(origins):
            if origin is not None:
                site = _site(eqn, operand, origin, len(shapes[origin.path]))
                if site is not None:
                    runs = 1 if times is None else times
                    sites.append(
                        Site(
                            path=origin.path,
                            primitive=eqn.primitive.name,
                            where=where,
                            weight=operand,
                            times=times,
                            flops=equation_flops(eqn) * runs,
                            bytes=equation_bytes(eqn) * runs,
                            source=source_line(eqn),
                            **site,
                        )
                    )

    follow(jaxpr, weight_origins(jaxpr, weights), visit)
    return sites


def weight_origins(jaxpr: ClosedJaxpr, weights: Sequence[Any]) -> list[Origin | None]:
    """For each input of a program, the weight that it is."""
    return [
        None if path is None else Origin(path, tuple((d,) for d in range(v.aval.ndim)))
        for path, v in zip(weights, jaxpr.jaxpr.invars, strict=True)
    ]


def find_scales(jaxpr: ClosedJaxpr, weights: Sequence[Any]) -> list[str]:
    """The weights of one dim that multiply something else entry by entry.

    They are the scales of norms and of layers: one number for each channel. (Along
    the dims that a scan slices there may be one such vector for each layer.)
    """
    found: dict[str, None] = {}

    def visit(where, eqn, origins, times):
        if eqn.primitive.name != "mul":
            return
        for origin, other in (origins, origins[::-1]):
            if origin is not None and other is None:
                if sum(map(bool, origin.dims)) == 1:
                    found[origin.path] = None

    follow(jaxpr, weight_origins(jaxpr, weights), visit)
    return list(found)


def _site(eqn: JaxprEqn, operand: int, o: Origin, ndim: int) -> dict | None:
    """What each dim of the weight does at `eqn`, or None if it is no site."""
    name = eqn.primitive.name
    if name == "dot_general":
        dims = dot_of(eqn, operand).dims
        contract, free = dims.w_contract, dims.w_free(len(o.dims))
    elif name == "conv_general_dilated" and operand == 1:
        conv = Conv(eqn.params)
        contract, free = (*conv.spatial_dims, conv.in_dim), (conv.out_dim,)
    elif name == "gather" and operand == 0 and lookup_dim(eqn) is not None:
        contract, free = (
            (),
            tuple(d for d in range(len(o.dims)) if d != lookup_dim(eqn)),
        )
    else:
        return None
    pick = lambda ds: tuple(sorted({x for d in ds for x in o.dims[d]}))
    contract, output = pick(contract), pick(free)
    batch = tuple(d for d in range(ndim) if d not in contract + output)
    return {"contract": contract, "output": output, "batch": batch}


def equation_bytes(eqn: JaxprEqn) -> int:
    """Bytes of an equation's operands and results, each counted once."""
    arrays = [v for v in (*eqn.invars, *eqn.outvars) if v.aval.shape is not None]
    return sum(
        math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize
        for v in arrays
        if isinstance(v.aval.dtype, np.dtype)
    )
