"""Optimizer states in 8 or 4 bits, whatever the optimizer.

`compress_state` wraps an optax transformation: its state rests in few bits, with a
scale for each block of neighbours, and is decoded for the length of an update.

Sources: Dettmers et al. 2021, arXiv:2110.02861 (8 bits, in blocks); Li et al. 2023,
arXiv:2309.01507 (4 bits).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import is_leaf

from .arrays import QArray, quantize_array
from .dynamic import Dynamic
from .formats import Format


def compress_state(
    tx: optax.GradientTransformation,
    bits: int = 8,
    *,
    block: int = 256,
    smallest: int = 4096,
    unsigned: tree.Patterns | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its state in few bits.

    A state array takes bits + 32 / block bits per number instead of 32, where its
    last dim is a multiple of the block; of other lengths the block is their largest
    common divisor with it, or the whole row where that is below 16.

    Args:
        tx: any transformation. What it keeps of a parameter has that one's shape.
        bits: 8 or 4.
        block: neighbours along the last dim that share a scale; the papers take 256
            or 2048 for 8 bits, 128 for 4.
        smallest: arrays of fewer numbers stay as they are.
        unsigned: patterns over the state's paths: what matches is never negative, and
            gets numbers twice as fine. By default what optax calls `nu`, the second
            moment of Adam and its kin.

    Raises:
        ValueError: `bits` is neither; `block` is below 1; when the state is made, a
            pattern matches nothing.
    """
    if bits not in (4, 8) or block < 1:
        raise ValueError(
            f"states are kept in 8 or 4 bits, in blocks of 1 or more, got bits={bits} "
            f"and block={block}."
        )
    inner = optax.with_extra_args_support(tx)

    def rest(state: PyTree) -> PyTree:
        paths = tree.paths(state)
        positive = {p for p in paths if "nu" in p.split("/")}
        if unsigned is not None:
            positive = set(tree.match(unsigned, paths, what="state"))

        def one(keypath: tuple, x: Any) -> Any:
            floating = tree.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
            if not floating or x.size < smallest or x.ndim == 0:
                return x
            signed = tree.path_name(keypath) not in positive
            n = x.shape[-1]
            size = math.gcd(block, n)
            fmt = Format(Dynamic(bits, signed), group=size if size >= 16 else None)
            batch = () if bits == 8 else range(x.ndim - 1)
            return quantize_array(x, fmt, (x.ndim - 1,), tuple(batch))

        return jax.tree_util.tree_map_with_path(one, state)

    def awake(state: PyTree) -> PyTree:
        decode = lambda x: x.dense() if isinstance(x, QArray) else x
        return jax.tree.map(decode, state, is_leaf=is_leaf)

    def init(params: PyTree) -> PyTree:
        return rest(inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, new = inner.update(updates, awake(state), params, **extra)
        return updates, rest(new)

    return optax.GradientTransformationExtraArgs(init, update)
