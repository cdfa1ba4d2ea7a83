"""Which operations run in low precision, which in float32, which in their operands'.

The lists are torch.amp's, carried over from layers to the primitives of a jaxpr.
There a softmax is a maximum, a difference, an `exp` and a sum, so it is also decided
*where float32 begins*: at the first of a run of operations whose results are used in
float32 only, and of which `grad` saves nothing (`wanted`). So a softmax subtracts its
maximum in float32 too, where rounding would cost accuracy and saves no memory.
As in torch.amp a look-up keeps its table's dtype, so a residual stream that begins
with one stays float32.

Source: the autocast op reference of PyTorch.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from jaxeff.program import bodies

# Run in the low dtype. Hardware accumulates them in float32.
PRODUCTS = frozenset(
    ["dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"]
)

# Rearrange one array, so any dtype will do.
VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice split rev "
    "dynamic_slice copy copy_p name stop_gradient pvary pcast pbroadcast reshard "
    "sharding_constraint mesh_cast".split()
)

# Run in the widest dtype among their operands.
KEEP = frozenset(
    "add sub mul div max min neg abs sign floor ceil round rem clamp select_n "
    "add_any square integer_pow sqrt cbrt tanh logistic erf erfc sin cos atan atan2 "
    "asinh atanh eq ne lt le gt ge is_finite concatenate pad gather scatter "
    "dynamic_update_slice reduce_max reduce_min argmax argmin top_k cummax cummin "
    "reduce_window_max reduce_window_min reduce_precision".split()
)

# Handle each operand by itself, in its own dtype.
EACH = VIEWS | frozenset(
    "sort optimization_barrier device_put psum psum_invariant pmax pmin ppermute "
    "all_gather all_gather_invariant all_to_all reduce_scatter".split()
)

# Element by element: here an operand with fewer elements does not widen the result.
ELEMENTWISE = frozenset(
    "add sub mul div max min select_n clamp add_any rem eq ne lt le gt ge".split()
)

# Multiply what they are given, so `grad` saves it.
MULTIPLY = frozenset("mul div square integer_pow".split())

# Linear in each operand or a choice between them: `grad` saves no operand, or a mask.
LINEAR = frozenset(
    "add sub neg max min select_n abs clamp add_any concatenate pad reduce_max "
    "reduce_min".split()
)

# Every other operation runs in float32: exp, exp2, expm1, log, log1p, pow, rsqrt,
# tan, sums, products, cumulative sums and products, pooling by mean, linear algebra,
# and whatever is not known here. Here a scatter-add does so too: it is a sum, and a
# sum of ones in bfloat16 stops at 256.


def is_product(eqn: JaxprEqn) -> bool:
    """Whether an equation is a product that may run in another dtype.

    One whose precision is set by hand (`precision=HIGHEST`, an algorithm) is not:
    its author has decided.
    """
    if eqn.primitive.name not in PRODUCTS:
        return False
    floats = [v for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    lowers = all(is_float32(v) for v in floats) and len(floats) >= 2
    precision = eqn.params.get("precision")
    asked = precision if isinstance(precision, tuple) else (precision,)
    # Where a default is set, every product carries it: then nobody chose this one's.
    default = jax.config.jax_default_matmul_precision  # pyrefly: ignore
    fast = all(p in (None, jax.lax.Precision.DEFAULT) for p in asked)
    return lowers and (fast or default is not None)


def keeps(eqn: JaxprEqn) -> bool:
    """Whether an equation runs in its operands' dtype, whatever that is."""
    name = eqn.primitive.name
    if name == "integer_pow":
        return eqn.params["y"] >= 0  # 1 / x overflows where x is small
    return name in KEEP or name in EACH


def widens(eqn: JaxprEqn) -> bool:
    """Whether an equation runs in float32 where its result is only used so.

    Squares do, which are summed, though `grad` saves what they square: it is what
    keeps a variance exact. Products with another array would save that for nothing.
    """
    name = eqn.primitive.name
    if name in ("mul", "div"):
        x, y = eqn.invars
        return x is y or not all(v.aval.shape for v in (x, y))
    return name in LINEAR or name in ("square", "integer_pow")


def is_float32(v: object) -> bool:
    """Whether a variable of a jaxpr was traced as float32."""
    return getattr(getattr(v, "aval", None), "dtype", None) == jnp.float32


@functools.lru_cache(maxsize=4096)
def wanted(jaxpr: Jaxpr, outs: tuple[bool, ...]) -> frozenset[Var]:
    """The variables that are only ever used in float32.

    Args:
        jaxpr: a program.
        outs: for each of its outputs whether it is wanted in float32.
    """
    use: dict[Var, bool] = {}

    def note(v, yes):
        if isinstance(v, Var):
            use[v] = use.get(v, True) and yes

    for v, yes in zip(jaxpr.outvars, outs, strict=True):
        note(v, yes)
    for eqn in reversed(jaxpr.eqns):
        want = [use.get(v, False) for v in eqn.outvars]
        for v, yes in zip(eqn.invars, _uses(eqn, want), strict=True):
            if yes is not None:
                note(v, yes)
    return frozenset(v for v, yes in use.items() if yes)


def _uses(eqn: JaxprEqn, want: Sequence[bool]) -> list[bool | None]:
    """For each operand whether this use is in float32; None if it does not matter."""
    uses: list[bool | None] = [None] * len(eqn.invars)
    inner = bodies(eqn)
    if eqn.primitive.name in ("scan", "while"):
        return [False] * len(uses)  # a loop's dtypes are found when it runs
    for body in inner:
        inside = wanted(body.jaxpr.jaxpr, tuple(want))
        for i, v in zip(body.operands, body.jaxpr.jaxpr.invars, strict=True):
            uses[i] = uses[i] is not False and v in inside
    if inner:
        return uses
    if is_product(eqn):
        return [False] * len(uses)
    if eqn.primitive.name == "convert_element_type":
        same = is_float32(eqn.outvars[0])
        return [want[0] if same else None]
    if keeps(eqn):
        if not (widens(eqn) or eqn.primitive.name in VIEWS):
            return [False] * len(uses)
        floats = [w for v, w in zip(eqn.outvars, want, strict=True) if is_float32(v)]
        return [all(floats) if floats else None] * len(uses)
    return [True] * len(uses)
