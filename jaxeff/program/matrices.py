"""A weight as the matrices that its data is multiplied with.

Calibrated techniques (Wanda, SparseGPT, GPTQ, AWQ) are written for `w @ x` with `w`
of (rows, columns): a row for each output, a column for each input. Here every
product and convolution is brought to that form, however the function gets there:

- a product is one matrix for each index of its batch dims;
- a convolution is a product with patches, one matrix for each of its groups;
- a reshaped, transposed or cut weight is found in the tree by pushing the numbers
  of its elements through the same operations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float

from .interpret import bind
from .leaf import Conv, Dot, dot_of
from .straight import run_step, Step, Straight

# What only shows a weight in another form, and so may be done to element numbers.
_SAME = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision")
_MOVES = (
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "slice",
    "split",
    "rev",
    "dynamic_slice",
)


def data_matrix(eqn: JaxprEqn, weight: int, x: Array) -> Float[Array, "groups n cols"]:
    """What meets a weight, as rows of inputs: `y = x @ w.T` for each group.

    Args:
        eqn: the product or convolution.
        weight: which of its operands is the weight.
        x: the other operand.

    Returns:
        float32. `cols` are in the order of `weight_matrix`.
    """
    x = x.astype(jnp.float32)
    if eqn.primitive.name == "conv_general_dilated":
        return _patches(Conv(dict(eqn.params)), eqn.invars[1].aval.shape, x)
    d = dot_of(eqn, weight).dims
    order = np.argsort(d.w_contract)
    contract = tuple(d.x_contract[i] for i in order)
    return _flat(x, d.x_batch, d.x_free(x.ndim), contract)


def weight_matrix(eqn: JaxprEqn, weight: int, w: Any) -> Any:
    """The weight that meets the data, or its element numbers: (groups, rows, cols).

    Columns are ordered as the weight has them; those of a convolution by place
    first, then by input channel, so that neighbours are channels of one place.
    """
    if eqn.primitive.name == "conv_general_dilated":
        conv = Conv(dict(eqn.params))
        w = w.transpose((conv.out_dim, *sorted(conv.spatial_dims), conv.in_dim))
        groups = conv.params["feature_group_count"]
        return w.reshape(groups, w.shape[0] // groups, -1)
    d = dot_of(eqn, weight).dims
    return _flat(w, d.w_batch, d.w_free(w.ndim), tuple(sorted(d.w_contract)))


def data_key(eqn: JaxprEqn, weight: int) -> Any:
    """Equal for two uses of the same data that see it as the same matrix."""
    if eqn.primitive.name == "conv_general_dilated":
        p, shape = eqn.params, eqn.invars[1].aval.shape
        numbers = p["dimension_numbers"]
        kernel = tuple(shape[d] for d in sorted(numbers.rhs_spec[2:]))
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        spec = (numbers.lhs_spec, np.argsort(numbers.rhs_spec[2:]).tolist())
        rest = [p[n] for n in (*names, "feature_group_count")]
        return ("conv", kernel, repr(spec), repr(rest))
    dot: Dot = dot_of(eqn, weight)
    pairs = sorted(zip(dot.dims.w_contract, dot.dims.x_contract, strict=True))
    return ("dot", tuple(x for _, x in pairs), tuple(dot.dims.x_batch))


def _flat(x: Any, batch: tuple, free: tuple, contract: tuple) -> Any:
    size = lambda dims: math.prod(x.shape[d] for d in dims)
    shape = (size(batch), size(free), size(contract))
    return x.transpose((*batch, *free, *contract)).reshape(shape)


def _patches(
    conv: Conv, kernel: tuple[int, ...], x: Array
) -> Float[Array, "groups n cols"]:
    """Every window of `x` that the kernel sees, as one row."""
    p, spec = conv.params, conv.params["dimension_numbers"]
    batch, channel, *space = spec.lhs_spec
    # Plain order first: (b, c, *space), and the kernel's dims of space likewise.
    x = x.transpose((batch, channel, *space))
    b, c, groups = x.shape[0], x.shape[1], p["feature_group_count"]
    size = [kernel[d] for d in conv.spatial_dims]
    # HIGHEST: it only copies, so nothing may be rounded on the way.
    y = jax.lax.conv_general_dilated_patches(
        x,
        filter_shape=size,
        window_strides=p["window_strides"],
        padding=p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    n = math.prod(y.shape[2:])
    y = y.reshape(b, groups, c // groups, *size, n)
    # The kernel's dims of space may lie in another order than the data's.
    order = [3 + i for i in np.argsort(conv.spatial_dims)]
    y = y.transpose((1, 0, y.ndim - 1, *order, 2))
    return y.reshape(groups, b * n, -1)


class Numbering:
    """Finds the elements of weights in what they are seen as.

    Args:
        program: straight.
        weights: number of each weight's value -> its shape.
        value: the value of a fixed number, for where a slice begins.
    """

    def __init__(
        self,
        program: Straight,
        weights: dict[int, tuple[int, ...]],
        value: Callable[[int], Any],
    ):
        self._made = {out: step for step in program.steps for out in step.outs}
        self._weights = weights
        self._value = value

    def __call__(self, number: int) -> tuple[int, Array] | str:
        """The weight that a value is a view of, and where each element lies in it.

        Returns:
            The weight's number, and for each element of the value its index in the
            flattened weight; or the reason why it is no view.
        """
        if number in self._weights:
            shape = self._weights[number]
            if math.prod(shape) > np.iinfo(np.int32).max:
                return "it has more elements than 32 bits can number"
            count = jnp.arange(math.prod(shape), dtype=jnp.int32)
            return number, count.reshape(shape)
        if number not in self._made:
            return "it is no weight"
        return self._step(self._made[number], number)

    def _step(self, step: Step, number: int) -> tuple[int, Array] | str:
        which = step.outs.index(number)
        name = step.kind if step.eqn is None else step.eqn.primitive.name
        if name == "take" and step.ins[0] in self._weights:
            # Without numbering all layers of a stack for each of them.
            shape = self._weights[step.ins[0]][1:]
            n = math.prod(shape)
            return step.ins[0], jnp.arange(n).reshape(shape) + n * step.turn
        if name == "optimization_barrier":
            source = step.ins[which]
            return "it is a constant" if source is None else self(source)
        if name not in (*_SAME, *_MOVES, "take"):
            return f"it is made by `{name}` before it is used"
        assert step.ins[0] is not None
        found = self(step.ins[0])
        if isinstance(found, str) or name in _SAME:
            return found
        weight, elements = found
        others = [None if i is None else self._value(i) for i in step.ins[1:]]
        if step.eqn is None:
            return weight, run_step(step, [elements])[0]
        literals = [getattr(v, "val", None) for v in step.eqn.invars[1:]]
        pairs = zip(others, literals, strict=True)
        args = [v if x is None else x for x, v in pairs]
        if name == "broadcast_in_dim" and math.prod(step.eqn.params["shape"]) != (
            elements.size
        ):
            return "it is repeated before it is used"
        return weight, bind(step.eqn, [elements, *args])[which]
