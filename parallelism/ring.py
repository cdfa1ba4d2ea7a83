"""All-reduce as a ring that runs both ways at once, for use inside of `shard_map`.

Every device sends only to its two neighbours. One half of the array travels up the
ring and the other down, so both directions of every link are busy. First each device
ends with the whole sum of one piece, then the pieces go around once more: n devices
send 2 (n-1)/n of the array each, which is the least there can be. What travels may be
encoded in few bits. All devices end with the same bits.

Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters
of workstations", doi:10.1016/j.jpdc.2008.09.002.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


class Wire(NamedTuple):
    """How a piece of an array travels.

    Attributes:
        encode: from a 1-D array to what is sent, a pytree of arrays.
        decode: back, from that and the number of elements.
    """

    encode: Callable[[Float[Array, " n"]], Any]
    decode: Callable[[Any, int], Float[Array, " n"]]


PLAIN = Wire(lambda x: x, lambda sent, size: sent)


def int8_wire(block: int = 256) -> Wire:
    """Eight bits a number, and a float32 scale for each block of them.

    A sum over n devices is rounded n times, n-1 of them on its way.

    Args:
        block: numbers that share a scale, >= 1.
    """
    if block < 1:
        raise ValueError(f"a scale is for a block of 1 number or more, got {block}.")

    def encode(x):
        x = x.astype(jnp.float32)
        rows = jnp.pad(x, (0, -x.size % block)).reshape(-1, block)
        scale = jnp.abs(rows).max(-1, keepdims=True) / 127
        codes = jnp.round(rows / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
        return codes, scale

    def decode(sent, size):
        codes, scale = sent
        return (codes * scale).reshape(-1)[:size]

    return Wire(encode, decode)


def ring_all_reduce(
    x: Num[Array, "*dims"], axis: str, *, wire: Wire = PLAIN
) -> Num[Array, "*dims"]:
    """The sum of an array over the devices of an axis, on each of them.

    Its gradient is that of the sum, and travels plain, whatever the wire: rounding is
    flat and has none of its own.

    Args:
        x: of the same shape on every device.
        axis: of the mesh, inside of `shard_map`.
        wire: how pieces travel, `int8_wire()` in few bits.

    Raises:
        NameError: there is no such axis here.
        ValueError: integers are to be encoded.
    """
    if wire is not PLAIN and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"floating-point numbers can be encoded for their way, but this is "
            f"{x.dtype}. Send it plain."
        )
    if jax.lax.axis_size(axis) == 1:
        return x
    return _ring(x, axis, wire) if wire is PLAIN else _encoded(x, axis, wire)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _encoded(x: Array, axis: str, wire: Wire) -> Array:
    return _ring(x, axis, wire)


def _backward(axis: str, wire: Wire, _: None, g: Array) -> tuple[Array]:
    # Every device gave to all sums, so it gets the sum of all their gradients.
    return (_ring(g, axis, PLAIN),)


_encoded.defvjp(lambda x, axis, wire: (_ring(x, axis, wire), None), _backward)


def _ring(x: Array, axis: str, wire: Wire) -> Array:
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    size = -(-x.size // (2 * n))
    # (way, piece, element): the first half goes up the ring, the second down.
    pieces = jnp.pad(x.reshape(-1), (0, 2 * n * size - x.size)).reshape(2, n, size)
    ways = [[(i, (i + step) % n) for i in range(n)] for step in (1, -1)]
    sign = jnp.array([1, -1])
    both = jnp.arange(2)

    def send(encoded):
        hop = lambda tree, way: jax.tree.map(
            lambda a: jax.lax.ppermute(a, axis, way), tree
        )
        return [hop(e, way) for e, way in zip(encoded, ways, strict=True)]

    def reduce(t, pieces):
        going = pieces[both, (me - sign * t) % n]
        came = send([wire.encode(p) for p in going])
        came = jnp.stack([wire.decode(c, size) for c in came])
        return pieces.at[both, (me - sign * (t + 1)) % n].add(came.astype(x.dtype))

    def gather(t, carry):
        pieces, going = carry
        came = send(going)
        whole = jnp.stack([wire.decode(c, size) for c in came]).astype(x.dtype)
        return pieces.at[both, (me - sign * t) % n].set(whole), came

    pieces = jax.lax.fori_loop(0, n - 1, reduce, pieces)
    mine = (me + sign) % n
    going = [wire.encode(p) for p in pieces[both, mine]]
    # Its own piece, too, as the others will read it.
    read = jnp.stack([wire.decode(g, size) for g in going]).astype(x.dtype)
    pieces = pieces.at[both, mine].set(read)
    pieces, _ = jax.lax.fori_loop(0, n - 1, gather, (pieces, going))
    return pieces.reshape(-1)[: x.size].reshape(x.shape)
