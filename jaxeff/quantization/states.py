"""Optimizer states in 8 or 4 bits, for every optimizer whose moments optax names.

`compress_state` wraps an optax transformation: its moments rest in few bits, with a
scale for each block of neighbours, and are decoded for the length of an update.

Sources: Dettmers et al. 2021, arXiv:2110.02861 (8 bits, in blocks); Li et al. 2023,
arXiv:2309.01507 (4 bits).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import is_leaf

from .arrays import QArray, quantize_array
from .dynamic import Dynamic
from .formats import Format

# Whether a moment has a sign, by the attribute of the state that holds it.
_MOMENTS = {
    **dict.fromkeys(("mu", "m1", "m2", "trace", "ema", "exp_avg", "grad_sum"), True),
    **dict.fromkeys(("nu", "nu_max", "exp_avg_sq", "sum_of_squares"), False),
    **dict.fromkeys(("grad_sum_sq", "e_g", "e_x", "v_row", "v_col"), False),
}
# By the state, where its attributes mean something else; others of it are no moments.
_OF: dict[str, Mapping[str, bool]] = {
    "FactoredState": {"v_row": False, "v_col": False, "v": False},
    "ScaleByAdanState": {"m": True, "v": True, "n": False},
    "ScaleBySimplifiedAdEMAMixState": {"m": True, "n": False},
    "MadgradState": {"grad_sum_sq": False, "s": True},
    "ScaleBySM3State": {"mu": False, "nu": True},
    "SophiaState": {"mu": True, "nu": True},  # the diagonal of a Hessian
    # They divide by nu - mu**2, which is not negative only while both are exact.
    "ScaleByRStdDevState": {},
    "ScaleByRStdDevWithCountState": {},
}
# Iterates and gradients: nothing averages out what rounding adds to them. Named, so
# that weights in a NamedTuple of one's own are not taken for moments in there.
_KEPT = {
    *("z", "x0", "params0", "init_params", "init_particles", "params", "updates"),
    *("acc_grads", "grad_acc", "avg_grad", "prev_updates", "previous_gradient"),
}


def compress_state(
    tx: optax.GradientTransformation,
    bits: int = 8,
    *,
    block: int = 256,
    smallest: int = 4096,
    signed: tree.Patterns | None = None,
    unsigned: tree.Patterns | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its moments in few bits.

    Moments are told by the name optax gives them in the state (`mu`, `nu`, `trace`
    and their like), whatever the weights are called; all else stays as it is: the
    iterates of schedule-free methods, gradients that are gathered, states that optax
    does not know.

    A moment takes bits + 32 / b bits per number, where a scale is shared by b, the
    largest common divisor of the block and the last dim, or, where that is below 16,
    the whole row. (Of 4 bits, an odd row ends in half a byte.) What would not shrink
    by a third stays as it is, as where the last dim is 1.

    Args:
        tx: any transformation. What it keeps of a parameter has that one's shape.
        bits: 8 or 4.
        block: neighbours along the last dim that share a scale; the papers take 256
            or 2048 for 8 bits, 128 for 4.
        smallest: arrays of fewer numbers stay as they are.
        signed, unsigned: patterns over the state's paths: what matches is a moment of
            either sign, or one that is never negative and gets finer numbers, as
            second moments do. They come before what the names tell.

    Raises:
        ValueError: `tx` is no transformation; `bits` is neither; `block` is below 1;
            when the state is made, a pattern matches nothing.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        name = getattr(tx, "__name__", type(tx).__name__)
        raise ValueError(
            f"states are those of a transformation, with `init` and `update`, got "
            f"{name}. Call it first: compress_state(optax.adam(1e-3))."
        )
    if bits not in (4, 8) or block < 1:
        raise ValueError(
            f"states are kept in 8 or 4 bits, in blocks of 1 or more, got bits={bits} "
            f"and block={block}."
        )
    inner = optax.with_extra_args_support(tx)

    def rest(state: PyTree) -> PyTree:
        paths = tree.paths(state)
        told: dict[str, bool] = {}
        for patterns, sign in ((signed, True), (unsigned, False)):
            if patterns is not None:
                found = tree.match(patterns, paths, what="state")
                told.update(dict.fromkeys(found, sign))

        def one(keypath: tuple, x: Any) -> Any:
            floating = tree.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
            if not floating or x.size < smallest or x.ndim == 0:
                return x
            sign = told.get(tree.path_name(keypath), _sign(state, keypath))
            n = x.shape[-1]
            size = math.gcd(block, n)
            size = size if size >= 16 else n
            row = -(-n * bits // 8) + 4 * (n // size)
            if sign is None or 3 * row > 2 * n * x.dtype.itemsize:
                return x
            fmt = Format(Dynamic(bits, sign), group=size)
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


def _sign(state: PyTree, keypath: tuple) -> bool | None:
    """Whether a moment has a sign; None: it is none, or not known to be."""
    at = state
    for key in keypath:
        match key:
            case GetAttrKey(name=name):
                # The weights, further in, may have attributes of any name.
                if isinstance(at, tuple):
                    known = _OF.get(type(at).__name__, _MOMENTS)
                    if name in known or known is not _MOMENTS or name in _KEPT:
                        return known.get(name)
                at = getattr(at, name)
            case SequenceKey(idx=i):
                at = at[i]
            case DictKey(key=k):
                at = at[k]
            case _:
                return None
    return None
