"""Ways to multiply by a weight that is stored in few bits.

They compute the same, and which is fastest depends on the machine, on how many rows
there are, and on whether a weight fits into a cache: `cost.tune_products` measures.

Splitting into 16-bit parts follows Henry et al. 2019, arXiv:1904.06376, section 2,
with one factor that is exact in bfloat16 to begin with.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxeff.program import Dot

from . import blocks, kernels
from .grids import named
from .linear import Linear

OUTPUTS = (128, 512)  # that are decoded at a time
INPUTS = (1, 32, 256)
_PARTS = 3  # bfloat16 has 8 bits of a float32's 24


def of(q: Any, x: Array, dot: Dot) -> dict[str, Callable[[], Any]]:
    """The forms of `q.dot(x, dot)`, a `QArray`'s product, but that one itself."""
    if q.activations is not None:
        if jax.default_backend() == "tpu" and not unfit_rows(q, x, dot):
            return {"rows rounded by a kernel": lambda: by_rows(q, x, dot)}
        return {}
    dtype = jnp.promote_types(x.dtype, q.dtype)
    out = dot.params["preferred_element_type"] or dtype
    found: dict[str, Callable[[], Any]] = {}
    grouped = q.sums_groups(dot)
    if not grouped:
        if q.dtype == jnp.float32:  # or decoding would round
            found["decoded first"] = lambda: dot(x.astype(dtype), q.dense())
        whole = q.zero is None or jnp.issubdtype(q.zero.dtype, jnp.integer)
        if dtype == jnp.float32 and isinstance(q.numbers, Linear) and whole:
            found["in bfloat16 parts"] = lambda: _in_parts(q, x, dot)
    if q.planes():
        found["byte by byte"] = lambda: _by_planes(q, x, dot)
    free, contract = dot.dims.w_free(q.ndim), dot.dims.w_contract
    longest = max(free, key=lambda d: q.shape[d], default=None)
    for size in OUTPUTS:
        if longest is not None and q.shape[longest] > size and q.can_cut(longest, size):
            run = functools.partial(_by_outputs, q, x, dot, longest, size)
            found[f"{size} outputs at a time"] = run
    # Groups are decoded to the dtype of the weight; a piece within one would not be.
    same = not grouped or q.dtype == jnp.float32
    for size in INPUTS if same else ():
        if len(contract) == 1 and q.shape[contract[0]] > size:
            if q.can_cut(contract[0], size):
                run = functools.partial(_by_inputs, q, x, dot, size)
                found[f"{size} inputs at a time"] = run
    if jax.default_backend() == "tpu" and not unfit(q, dot):
        found["kernel"] = lambda: by_kernel(q, x, dot)
    finish = lambda run: lambda: run().astype(out)
    return {name: finish(run) for name, run in found.items()}


def _by_planes(q: Any, x: Array, dot: Dot) -> Array:
    """Codes that share a byte are multiplied apart, so that none is moved."""
    return _joined(q, _parts(q, x, dot), x, dot)


def _parts(q: Any, x: Array, dot: Dot) -> list[Array]:
    """The products with each of the codes that share a byte, for `_joined`."""
    planes, d = q.planes(), dot.dims
    dim = None if q.packed is None else q.packed + q.ndim
    if not planes or dim in d.w_batch:
        return [q.dot(x, dot)]
    if dim not in d.w_contract:
        return [plane.dot(x, dot) for plane in planes]
    n, at = len(planes), d.x_contract[d.w_contract.index(dim)]
    parts = [jax.lax.slice_in_dim(x, i, None, n, at) for i in range(n)]
    pairs = zip(planes, parts, strict=True)
    return [functools.reduce(jnp.add, [plane.dot(x, dot) for plane, x in pairs])]


def _joined(q: Any, parts: Sequence[Array], x: Array, dot: Dot) -> Array:
    """Where codes that share a byte are of several outputs, these put in order."""
    if len(parts) == 1:
        return parts[0]
    free = dot.dims.w_free(q.ndim)
    place = dot.output_dims(x.ndim, q.ndim)["w"][free.index(q.packed + q.ndim)]
    y = jnp.stack(parts, place + 1)
    return y.reshape(*y.shape[:place], -1, *y.shape[place + 2 :])


def _by_outputs(q: Any, x: Array, dot: Dot, dim: int, size: int) -> Array:
    """Outputs piece by piece: what is decoded never leaves the cache."""
    run = lambda i: _by_planes(q.piece(dim, i, size), x, dot)
    y = jax.lax.map(run, jnp.arange(q.shape[dim] // size))
    place = dot.output_dims(x.ndim, q.ndim)["w"][dot.dims.w_free(q.ndim).index(dim)]
    y = jnp.moveaxis(y, 0, place)
    return y.reshape(*y.shape[:place], q.shape[dim], *y.shape[place + 2 :])


def _by_inputs(q: Any, x: Array, dot: Dot, size: int) -> Array:
    """The sum over pieces of the inputs, likewise."""
    (dim,), (at,) = dot.dims.w_contract, dot.dims.x_contract
    wide = jnp.promote_types(x.dtype, jnp.float32)
    params = {**dot.params, "preferred_element_type": wide}
    inner = dataclasses.replace(dot, params=params)

    def products(i: Any) -> list[Array]:
        part = jax.lax.dynamic_slice_in_dim(x, i * size, size, at)
        return _parts(q.piece(dim, i, size), part, inner)

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(products, 0))
    add = lambda i, totals: jax.tree.map(jnp.add, totals, products(i))
    totals = jax.lax.fori_loop(0, q.shape[dim] // size, add, start)
    return _joined(q, totals, x, dot)


def _in_parts(q: Any, x: Array, dot: Dot) -> Array:
    """`x` as a sum of bfloat16 numbers, each times the integers, which are exact.

    By themselves the derivatives of these products would be of bfloat16.
    """
    params = {"precision": None, "preferred_element_type": jnp.float32}
    inner = dataclasses.replace(dot, params={**dot.params, **params})

    def run(x: Array, q: Any) -> Array:
        w, total = q.astype(jnp.bfloat16), None
        for _ in range(_PARTS):
            part = jax.lax.reduce_precision(x, 8, 7)
            # What is too large for bfloat16 leaves nothing: inf - inf is no number.
            x = jnp.where(jnp.isfinite(part), x - part, 0)
            y = w.dot(part.astype(jnp.bfloat16), inner)
            total = y if total is None else total + y
        assert total is not None
        return total

    return _derived(run, dot)(x.astype(jnp.float32), q)


def _derived(run: Callable, dot: Dot) -> Callable:
    """`run(x, q)` with the derivative of the product."""
    with_rule = jax.custom_jvp(run)
    exact = lambda x, q: q.dot(x, dot).astype(jnp.float32)
    with_rule.defjvp(lambda p, t: (run(*p), jax.jvp(exact, p, t)[1]))
    return with_rule


def unfit(q: Any, dot: Dot) -> str:
    """Why no kernel multiplies by it; empty where one does."""
    if not (isinstance(q.numbers, Linear) and q.numbers.symmetric and q.outer is None):
        return "kernels multiply by symmetric integers under one scale"
    d = dot.dims
    inputs = list(d.w_contract)
    if d.w_batch or inputs != list(range(len(inputs))) or q.scale.dtype != jnp.float32:
        return "kernels take weights of inputs by outputs, under float32 scales"
    n_in = math.prod(q.shape[i] for i in inputs)
    shape = _scale_shape(q, len(inputs))
    if shape is None:
        return "its groups of inputs are no runs"
    packed = None
    if q.packed is not None:
        dim = q.packed + q.ndim
        last = dim in (len(inputs) - 1, q.ndim - 1)
        if not last or q.length % 2:
            return "its pairs of integers are not neighbours"
        packed = int(dim >= len(inputs))
    return kernels.unfit(n_in, q.size // n_in, q.bits, packed, n_in // shape[0])


def _scale_shape(q: Any, n: int) -> tuple[int, int] | None:
    """(groups, outputs) of the scale, where it is one for each run of inputs."""
    lengths, sizes = q.scale.shape[:n], q.shape[:n]
    split = [i for i in range(n) if 1 < lengths[i] < sizes[i]]
    # Dims before the one that is cut have a scale for each index, those after one.
    at = split[0] if split else sum(m > 1 for m in lengths)
    before = all(lengths[i] == sizes[i] for i in range(min(at, n)))
    after = all(lengths[i] == 1 for i in range(at + bool(split), n))
    if len(split) > 1 or not before or not after:
        return None
    return math.prod(lengths), math.prod(q.shape[n:])


def by_kernel(q: Any, x: Array, dot: Dot, *, interpret: bool = False) -> Array:
    """The product by `kernels.product`, float32."""
    run = lambda x, q: _run_kernel(q, x, dot, interpret)
    return _derived(run, dot)(x, q)


def _run_kernel(q: Any, x: Array, dot: Dot, interpret: bool) -> Array:
    d, n = dot.dims, len(dot.dims.w_contract)
    shape = _scale_shape(q, n)
    assert shape is not None and not unfit(q, dot)
    order = sorted(zip(d.w_contract, d.x_contract, strict=True))
    free = d.x_free(x.ndim)
    rows = x.transpose((*free, *(at for _, at in order)))
    n_in = math.prod(q.shape[:n])
    rows = rows.reshape(math.prod(x.shape[i] for i in free), n_in)
    scale = blocks.expand(q.scale, [*q.scale.shape[:n], *q.shape[n:]])
    packed = None if q.packed is None else int(q.packed + q.ndim >= n)
    values = q.values.reshape(math.prod(q.values.shape[:n]), -1)
    y = kernels.product(
        rows,
        values,
        scale.reshape(shape),
        bits=q.bits,
        packed=packed,
        interpret=interpret,
    )
    y = y.reshape(*(x.shape[i] for i in free), *q.shape[n:])
    if dot.weight_first:
        y = jnp.moveaxis(y, range(len(free)), range(-len(free), 0))
    return y


def unfit_rows(q: Any, x: Array, dot: Dot) -> str:
    """Why no kernel rounds what it is multiplied with; empty where one does."""
    grid = named(q.activations)
    if not (isinstance(grid, Linear) and grid.symmetric and grid.narrow):
        return "kernels round to symmetric integers"
    if q.x_scale is not None or q.sums_groups(dot):
        return "its rows have no scale that is found as they arrive"
    n = len(dot.dims.x_contract)
    if set(dot.dims.x_contract) != set(range(x.ndim - n, x.ndim)):
        return "what is summed are not the last dims"
    return kernels.unfit_rows(math.prod(x.shape[x.ndim - n :]))


def by_rows(q: Any, x: Array, dot: Dot, *, interpret: bool = False) -> Array:
    """The product with rows rounded by `kernels.round_rows`."""

    def rounding(x: Array, shared: Sequence[int], grid: Any, *_: Any) -> Any:
        rows = x.shape[: x.ndim - len(shared)]
        flat = x.reshape(math.prod(rows), -1)
        top = int(grid.largest)
        codes, scale = kernels.round_rows(flat, largest=top, interpret=interpret)
        return codes.reshape(x.shape), scale.reshape(*rows, *[1] * len(shared))

    return q.dot(x, dot, rounding)
