"""Gradients in fewer bytes: optax transforms that average over the devices themselves.

    tx = optax.chain(powersgd(devices=8, rank=4), optax.adamw(1e-3))
    step = make_train_step(loss, tx, per_device=mesh)

They run inside of `shard_map`, where every device holds the gradient of its own part of
the batch, and return the mean over the axis, the same on all. What a message leaves out
is added to the next gradient (error feedback), so nothing is lost, only late (but for
the rounding of a result to the dtype of the gradient). These
remainders differ between devices: they are `PerDevice` in the state. A gradient that is
not finite gives a mean that is not, as without compression. `tx.sent(params)` says how
many bytes a device sends in a step.

Sources: Seide et al. 2014 (error feedback, 1 bit); Karimireddy et al. 2019,
arXiv:1901.09847 (why it converges); Tang et al. 2021, arXiv:2102.02888, section 5 (both
ways compressed); Stich et al. 2018, arXiv:1809.07599 (top-k, random-k); Vogels et al.
2019, arXiv:1905.13727 (PowerSGD).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree, UInt8

from .per_device import Averaged, check_axis, check_devices, PerDevice


class Compression(optax.GradientTransformation):
    """An optax transform that also knows what it sends."""

    sent: Callable[[PyTree], float]
    """`sent(params)`: bytes that each device sends in a step."""

    def __new__(cls, init: Callable, update: Callable, sent: Callable):
        """A transform of two functions, and what it sends."""
        made = super().__new__(cls, init, update)
        made.sent = sent
        return made


class _State(NamedTuple):
    step: Int[Array, ""]
    shared: PyTree  # the same on all devices
    own: PerDevice


# (gradient as one vector, step, own state) -> (mean, own state)
_Reduce = Callable[[Array, Array, Any], tuple[Array, Any]]


def _on_vector(
    axis: str,
    devices: int,
    start: Callable[[int], Any],
    reduce: _Reduce,
    sent: Callable[[int], float],
) -> Compression:
    """A transform of the whole gradient as one float32 vector."""
    check_devices(devices)

    def init(params):
        size = _size(params)
        zeros = lambda n: jnp.zeros((devices, n), jnp.float32)
        own = PerDevice(jax.tree.map(zeros, start(size)))
        return _State(jnp.zeros([], jnp.int32), (), own)

    def update(grads, state, params=None):
        check_axis(axis, devices)
        flat, unravel = ravel_pytree(_wide(grads))
        own = jax.tree.map(lambda a: a[0], state.own.values)
        mean, own = reduce(flat, state.step, own)
        own = PerDevice(jax.tree.map(lambda a: a[None], own))
        mean = _like(unravel(mean), grads)
        return mean, _State(state.step + 1, (), own)

    return Compression(init, update, lambda params: sent(_size(params)))


def average(*, devices: int, axis: str = "data") -> Compression:
    """The mean in full: what the others are compared with.

    Args:
        devices: of the axis.
        axis: whose devices share the batch.

    Raises:
        ValueError: there is no device.
    """
    check_devices(devices)

    def update(grads, state, params=None):
        check_axis(axis, devices)
        return jax.lax.pmean(grads, axis), state

    def sent(params):
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return 2 * (devices - 1) / devices * total

    return Compression(lambda params: Averaged(), update, sent)


class _Coder(NamedTuple):
    """Rows of numbers, (rows, n), as a pytree of arrays with as many rows, and back."""

    encode: Callable[[Float[Array, "rows n"]], tuple[Array, ...]]
    decode: Callable[[tuple[Array, ...]], Float[Array, "rows n"]]
    bytes: Callable[[int], float]  # of a row of n numbers


def rounded(
    bits: int = 8, *, devices: int, axis: str = "data", block: int = 256
) -> Compression:
    """Integers, or one bit, and a float32 scale for each block of numbers.

    Each device sends a piece of its gradient to each other, averages the pieces it
    gets, and sends the mean of its piece to all: both ways rounded, and with the
    remainder kept both times.

    Args:
        bits: 8 or 4; or 1, the sign alone, times the block's mean magnitude.
        devices: of the axis.
        axis: whose devices share the batch.
        block: numbers with a scale of their own, a multiple of 8.

    Raises:
        ValueError: another number of bits, or another block.
    """
    return _with_remainders(_rounding(bits, block), block, devices, axis)


def _rounding(bits: int, block: int) -> _Coder:
    coders = {8: _integers(8, block), 4: _integers(4, block), 1: _signs(block)}
    whole = isinstance(block, int)
    if bits not in coders or not whole or block < 8 or block % 8:
        raise ValueError(
            f"gradients are rounded to 8, 4 or 1 bits in blocks of a multiple of 8, "
            f"got {bits} bits in blocks of {block}."
        )
    return coders[bits]


def float8(*, devices: int, axis: str = "data", block: int = 256) -> Compression:
    """As `rounded`, but to float8_e4m3: small numbers keep their precision.

    Args:
        devices: of the axis.
        axis: whose devices share the batch.
        block: numbers with a scale of their own, >= 1.

    Raises:
        ValueError: another block.
    """
    if block < 1:
        raise ValueError(f"a scale is for a block of 1 number or more, got {block}.")
    kind = jnp.float8_e4m3fn
    most = float(jnp.finfo(kind).max)

    def encode(x):
        scale = _nonzero(jnp.abs(x).max(-1, keepdims=True) / most)
        return jax.lax.bitcast_convert_type((x / scale).astype(kind), jnp.uint8), scale

    def decode(sent):
        codes, scale = sent
        return jax.lax.bitcast_convert_type(codes, kind).astype(jnp.float32) * scale

    coder = _blocked(encode, decode, block, 1.0)
    return _with_remainders(coder, block, devices, axis)


class _Exchange(NamedTuple):
    """A mean over the devices in fewer bytes: rounded on the way there, and back."""

    coder: _Coder
    block: int
    devices: int
    axis: str

    def piece(self, size: int) -> int:
        """Numbers that each device averages, of `size`."""
        return -(-size // (self.devices * self.block)) * self.block

    def mean(self, flat: Array, there: Any = 0.0, back: Any = 0.0) -> tuple:
        """The mean, and what the rounding there and back left out.

        Args:
            flat: one vector.
            there, back: what the last rounding left out.
        """
        n, size, coder = self.piece(flat.size), flat.size, self.coder
        mine = there + jnp.pad(flat, (0, self.devices * n - size))
        out = coder.encode(mine.reshape(self.devices, n))
        there = mine - coder.decode(out).reshape(-1)
        swap = lambda a: jax.lax.all_to_all(a, self.axis, 0, 0, tiled=True)
        came = coder.decode(jax.tree.map(swap, out))
        mean = came.mean(0) + back
        out = coder.encode(mean[None])
        back = mean - coder.decode(out)[0]
        gather = lambda a: jax.lax.all_gather(a, self.axis, tiled=True)
        whole = coder.decode(jax.tree.map(gather, out)).reshape(-1)[:size]
        return whole, there, back

    def sent(self, size: int) -> float:
        """Bytes that each device sends."""
        return 2 * (self.devices - 1) * self.coder.bytes(self.piece(size))


def _with_remainders(coder: _Coder, block: int, devices: int, axis: str) -> Compression:
    exchange = _Exchange(coder, block, devices, axis)

    def start(size):
        return {"there": devices * exchange.piece(size), "back": exchange.piece(size)}

    def reduce(flat, step, own):
        whole, there, back = exchange.mean(flat, own["there"], own["back"])
        return whole, {"there": there, "back": back}

    return _on_vector(axis, devices, start, reduce, exchange.sent)


def _blocked(encode: Callable, decode: Callable, block: int, each: float) -> _Coder:
    """A coder out of one for blocks, (..., block)."""

    def rows(x):
        return encode(x.reshape(len(x), -1, block))

    def back(sent):
        y = decode(sent)
        return y.reshape(len(y), -1)

    return _Coder(rows, back, lambda n: n * (each + 4 / block))


def _integers(bits: int, block: int) -> _Coder:
    most = 2 ** (bits - 1) - 1

    def encode(x):
        scale = _nonzero(jnp.abs(x).max(-1, keepdims=True) / most)
        codes = jnp.round(x / scale).astype(jnp.int8)
        if bits == 4:
            low, high = codes[..., ::2] & 15, codes[..., 1::2] << 4
            codes = low | high
        return codes, scale

    def decode(sent):
        codes, scale = sent
        if bits == 4:
            pairs = jnp.stack([(codes << 4) >> 4, codes >> 4], -1)
            codes = pairs.reshape(*codes.shape[:-1], -1)
        return codes * scale

    return _blocked(encode, decode, block, bits / 8)


def _signs(block: int) -> _Coder:
    def encode(x):
        return jnp.packbits(x >= 0, axis=-1), jnp.abs(x).mean(-1, keepdims=True)

    def decode(sent: tuple[UInt8[Array, "..."], Array]):
        bits, scale = sent
        return (2 * jnp.unpackbits(bits, axis=-1).astype(jnp.float32) - 1) * scale

    return _blocked(encode, decode, block, 1 / 8)


def top_k(fraction: float, *, devices: int, axis: str = "data") -> Compression:
    """Each device sends its numbers of largest magnitude, with their places.

    Args:
        fraction: of the numbers, in (0, 1].
        devices: of the axis. All get what all send, so bytes grow with them.
        axis: whose devices share the batch.

    Raises:
        ValueError: the fraction is out of range.
    """
    _check_fraction(fraction)
    count = lambda size: max(1, round(fraction * size))

    def reduce(flat, step, own):
        mine = own + flat
        _, at = jax.lax.top_k(jnp.abs(mine), count(flat.size))
        values = mine[at]
        all_at, all_values = (
            jax.lax.all_gather(a, axis, tiled=True) for a in (at, values)
        )
        mean = jnp.zeros_like(flat).at[all_at].add(all_values / devices)
        return mean, mine.at[at].set(0.0)

    sent = lambda size: (devices - 1) * count(size) * 8
    return _on_vector(axis, devices, lambda size: size, reduce, sent)


def random_k(
    fraction: float, *, devices: int, axis: str = "data", seed: int = 0
) -> Compression:
    """All devices send the same numbers, drawn anew in each step: no places are sent.

    Args:
        fraction: of the numbers, in (0, 1].
        devices: of the axis.
        axis: whose devices share the batch.
        seed: of the draws.

    Raises:
        ValueError: the fraction is out of range.
    """
    _check_fraction(fraction)
    count = lambda size: max(1, round(fraction * size))

    def reduce(flat, step, own):
        mine = own + flat
        key = jr.fold_in(jr.key(seed), step)
        at = jr.choice(key, flat.size, (count(flat.size),), replace=False)
        # What is not finite is seen at once, whichever numbers were drawn.
        bad = jnp.where(jnp.isfinite(flat).all(), 0.0, jnp.nan)
        values = jax.lax.pmean(mine[at] + bad, axis)
        return jnp.zeros_like(flat).at[at].set(values), mine.at[at].set(0.0)

    sent = lambda size: 2 * (devices - 1) / devices * count(size) * 4
    return _on_vector(axis, devices, lambda size: size, reduce, sent)


def powersgd(
    rank: int = 4,
    *,
    devices: int,
    axis: str = "data",
    bits: int | None = None,
    block: int = 256,
    seed: int = 0,
) -> Compression:
    """The gradient of each matrix as a product of two thin ones: one power iteration.

    The thin matrix of a step is where the next begins, with columns drawn anew where it
    has zeros: a gradient of zeros leaves nothing to begin with. An array of more dims
    is a matrix of its last dim; one of fewer than two, or that would not become
    smaller, is sent in full.

    Args:
        rank: columns of the thin matrices, >= 1.
        devices: of the axis.
        axis: whose devices share the batch.
        bits: of each number of the thin matrices, which are rounded as by `rounded`: in
            8 bits four times the rank takes as many bytes. None is float32.
        block: numbers with a scale of their own, of rounded ones: runs down the columns
            of the thin matrices, which can differ in size by orders of magnitude.
        seed: of the columns that are drawn.

    Raises:
        ValueError: the rank is below 1, or as `rounded` does.
    """
    check_devices(devices)
    if rank < 1:
        raise ValueError(f"a matrix has rank 1 or more, got rank={rank}.")
    exchange = None
    if bits is not None:
        exchange = _Exchange(_rounding(bits, block), block, devices, axis)

    def thin(x):
        if x is None:  # it does not train
            return False
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1
        return x.ndim > 1 and rank * (rows + columns) < rows * columns

    def mean(factors):
        """Of all thin matrices in one message; the same everywhere."""
        if not factors:
            return factors
        # A column after the other: those of small ones get scales of their own.
        flat, unravel = ravel_pytree({i: x.T for i, x in factors.items()})
        if exchange is None:
            flat = jax.lax.pmean(flat, axis)
        else:
            flat, _, _ = exchange.mean(flat)
        return {i: x.T for i, x in unravel(flat).items()}

    def init(params):
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_none)
        keys = jr.split(jr.key(seed), len(leaves))
        first = [
            jr.normal(k, (x.shape[-1], rank), jnp.float32) if thin(x) else None
            for k, x in zip(keys, leaves, strict=True)
        ]
        left = [
            jnp.zeros((devices, *x.shape), jnp.float32) if thin(x) else None
            for x in leaves
        ]
        unflatten = lambda of: jax.tree.unflatten(structure, of)
        return _State(
            jnp.zeros([], jnp.int32), unflatten(first), PerDevice(unflatten(left))
        )

    def update(grads, state, params=None):
        check_axis(axis, devices)
        flat, structure = jax.tree.flatten(grads, is_leaf=_is_none)
        old = jax.tree.leaves(state.shared, is_leaf=_is_none)
        left = jax.tree.leaves(state.own.values, is_leaf=_is_none)
        # By their place: the matrices that are sent as thin ones.
        split = [i for i, q in enumerate(old) if q is not None]
        mine = {i: flat[i].astype(jnp.float32) + left[i][0] for i in split}
        m = {i: mine[i].reshape(-1, mine[i].shape[-1]) for i in split}
        # The same on all devices, and for all matrices, which need not differ in it.
        key = jr.fold_in(jr.key(seed), state.step)
        longest = max((len(old[i]) for i in split), default=0)
        drawn = jr.normal(key, (longest, rank), jnp.float32)
        start = {i: _filled(old[i], drawn[: len(old[i])]) for i in split}
        p = mean({i: m[i] @ _unit(start[i]) for i in split})
        p = {i: jnp.linalg.qr(x)[0] for i, x in p.items()}
        q = mean({i: m[i].T @ p[i] for i in split})
        # Both are the same everywhere; the remainder is each device's own.
        near = {i: (p[i] @ q[i].T).reshape(mine[i].shape) for i in split}

        def whole(i, g):
            if g is None:
                return None
            return near[i].astype(g.dtype) if i in q else jax.lax.pmean(g, axis)

        unflatten = lambda of: jax.tree.unflatten(structure, of)
        every = range(len(flat))
        kept = [(mine[i] - near[i])[None] if i in q else None for i in every]
        new = _State(
            state.step + 1,
            unflatten([q.get(i) for i in every]),
            PerDevice(unflatten(kept)),
        )
        return unflatten([whole(i, g) for i, g in enumerate(flat)]), new

    def sent(params):
        leaves = jax.tree.leaves(params)
        full = sum(x.size * x.dtype.itemsize for x in leaves if not thin(x))
        split = [x for x in leaves if thin(x)]
        rows = rank * sum(math.prod(x.shape[:-1]) for x in split)
        columns = rank * sum(x.shape[-1] for x in split)
        factor = 2 * (devices - 1) / devices
        if exchange is None:
            return factor * (full + 4 * (rows + columns))
        return factor * full + exchange.sent(rows) + exchange.sent(columns)

    return Compression(init, update, sent)


def _is_none(x: Any) -> bool:
    return x is None


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction is in (0, 1], got {fraction}.")


def _filled(
    columns: Float[Array, "n r"], drawn: Float[Array, "n r"]
) -> Float[Array, "n r"]:
    """The columns, and those that were drawn where they are zeros.

    Zeros would be a product of zeros, and whatever orthogonal columns are made of that:
    the first rows, along which there may never be a gradient.
    """
    return jnp.where(jnp.any(columns != 0, axis=0), columns, drawn)


def _unit(columns: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """Columns of length 1, so that their products are of like size."""
    return columns / _nonzero(jnp.linalg.norm(columns, axis=0, keepdims=True))


def _nonzero(scale: Array) -> Array:
    """A scale to divide by; nan stays nan, so that what is not finite arrives so."""
    return jnp.where(scale == 0, 1, scale)


def _size(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _wide(grads: PyTree) -> PyTree:
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _like(values: PyTree, grads: PyTree) -> PyTree:
    return jax.tree.map(lambda v, g: v.astype(g.dtype), values, grads)
