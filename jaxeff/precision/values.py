"""What autocast hands around besides arrays: weights and numbers, which do not widen.

A bias in float32 that is added to a product in bfloat16 must not make the sum
float32. So weights take the dtype of what they meet, as Python's numbers do in
JAX; only data that is float32 keeps what it meets in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.tree import pytree, static


@pytree
class Held:
    """An array that was traced as float32, in one or both of two dtypes.

    Law: where both are there, `low` is `wide` rounded.

    Attributes:
        wide: in float32, or None.
        low: in the low dtype, or None where it has not been made yet.
        yields: whether it takes the dtype of what it meets, as weights do.
        origin: the loop it enters and its place among the loop's operands.
    """

    wide: Any
    low: Any = None
    yields: bool = static(default=False)
    origin: tuple[int, int] | None = static(default=None)


@pytree
class Number:
    """A float32 number written in the program, broadcast to some shape."""

    value: float = static()
    shape: tuple[int, ...] = static()

    def array(self, dtype: Any) -> Any:
        """The array of that shape and number."""
        if self.shape == ():
            with np.errstate(over="ignore", under="ignore"):
                return np.asarray(self.value, dtype)
        return jax.lax.full(self.shape, self.value, dtype)

    def fits(self, dtype: Any) -> bool:
        """Whether `dtype` holds it as a number that is neither 0 nor infinite.

        A mask's -3e38 is infinite in float16, and in bfloat16 too; 1e-8 is zero.
        """
        if self.value == 0 or not np.isfinite(self.value):
            return True
        rounded = self._rounded(dtype)
        return rounded != 0 and bool(np.isfinite(rounded))

    def exact(self, dtype: Any) -> bool:
        """Whether `dtype` holds it unrounded."""
        return self._rounded(dtype) == self.value or not np.isfinite(self.value)

    def _rounded(self, dtype: Any) -> float:
        return float(Number(self.value, ()).array(dtype))


def number(x: Any) -> Number | None:
    """The number an operand is, or None: literals are known while tracing."""
    if isinstance(x, Number):
        return x
    if isinstance(x, jax.Array | Held) or np.ndim(x) != 0:
        return None
    if not jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.floating):
        return None
    return Number(float(x), ())


def is_written(x: Any) -> bool:
    """Whether an operand is a number written in the program, of any dtype."""
    return isinstance(x, Number) or (
        not isinstance(x, jax.Array | Held) and np.ndim(x) == 0
    )


def yields(x: Any) -> bool:
    """Whether an operand takes the dtype of what it meets."""
    return x.yields if isinstance(x, Held) else is_written(x)


def is_wide(x: Any) -> bool:
    """Whether an operand is an array in float32, or stands for one."""
    return isinstance(x, Held) or (not is_written(x) and x.dtype == jnp.float32)


def array_of(x: Any) -> Any:
    """An array of an operand's shape: itself, or one of the two that it holds."""
    return x if not isinstance(x, Held) else x.low if x.wide is None else x.wide


def mark(x: Any, origin: tuple[int, int]) -> Any:
    """An operand of a loop that tells in which dtypes the loop wants it."""
    if isinstance(x, Held):
        return Held(x.wide, x.low, x.yields, origin)
    return Held(x, origin=origin) if is_wide(x) else x


@jax.custom_jvp
def shared(wide: Any, low: Any) -> Any:
    """`low`, which is `wide` rounded; its gradient goes to `wide`, in float32."""
    return low


@shared.defjvp
def _shared_jvp(primals, tangents):
    low = primals[1]
    return low, tangents[0].astype(low.dtype)
