"""Mixed precision for any function: each operation in the dtype it can stand.

`autocast(fn)` traces `fn` and runs the trace again with the products in bfloat16,
sums and exponentials in float32, and the rest in whatever arrives (`rules.py`).
Applied before `grad`, so what is saved for the backward pass is saved in low
precision. The weights stay float32; a weight used in a loop is cast once, before it.

Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.amp.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxeff.program import Call, Rewritten

from .recast import Recast

LOW = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Autocast(Rewritten):
    """A function in mixed precision; see `autocast`."""

    dtype: Any
    outputs: Any = None

    def settings(self) -> dict[str, Any]:
        """The two dtypes by name."""
        outputs = None if self.outputs is None else self.outputs.name
        return {"dtype": self.dtype.name, "outputs": outputs}

    @classmethod
    def restored(cls, fn: Callable, settings: Mapping[str, Any]) -> "Autocast":
        """`fn` in the dtypes of these names."""
        outputs = settings["outputs"]
        return cls(
            fn,
            jnp.dtype(settings["dtype"]),
            None if outputs is None else jnp.dtype(outputs),
        )

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn`, with each operation in the dtype it can stand."""
        call = Call(self.fn, params, args, kwargs, open_leaves=True)
        rule = Recast(self.dtype)
        outs = [v.aval.dtype for v in call.jaxpr.jaxpr.outvars]
        if self.outputs is not None:
            low = lambda t: jnp.issubdtype(t, jnp.floating)
            outs = [self.outputs if low(t) else t for t in outs]
        weights = [path is not None for path in call.weights]
        ys = rule.start(
            call.jaxpr, call.inputs, weights, [t == jnp.float32 for t in outs]
        )
        # Where all products are of integers, quantization has left nothing to cast.
        quantized = any(jnp.issubdtype(t, jnp.integer) for t in rule.products)
        done = self.dtype == jnp.float32 or self.dtype in rule.products
        if not done and not quantized:
            raise ValueError(_nothing_to_cast(self.dtype, rule.products))
        return call.unflatten([_cast(y, t) for y, t in zip(ys, outs, strict=True)])


def autocast(
    fn: Callable, dtype: DTypeLike = jnp.bfloat16, *, outputs: DTypeLike | None = None
) -> Callable:
    """Makes `fn(params, *args)` run its products in `dtype`.

    Apply it before `jax.grad`. `params` stay float32 and so do their gradients; the
    biases and scales among them do not widen what they meet. Only what was float32
    is cast, and a product with an explicit `precision` is left as it is. For float16
    scale the loss (`DynamicLossScale`).

    Laws: with `dtype=float32` it equals `fn` bit for bit; it can be jitted,
    differentiated and vmapped.

    Args:
        fn: any function; a lifted or shrunk one too.
        dtype: bfloat16 or float16; float32 changes nothing.
        outputs: the dtype of floating-point results. By default that of `fn`'s own,
            so a loss stays float32.

    Raises:
        ValueError: the dtype is none of these; or, when called, no product of `fn`
            runs in it.
    """
    low = _dtype(dtype)
    if low not in map(jnp.dtype, LOW):
        raise ValueError(
            f"autocast runs in bfloat16 or float16 (or float32, which changes "
            f"nothing), got {low}. For fewer bits quantize the weights."
        )
    return Autocast(fn, low, None if outputs is None else _dtype(outputs))


def _dtype(given: DTypeLike) -> Any:
    try:
        return jnp.dtype(given)
    except TypeError:
        raise ValueError(
            f"there is no dtype {given!r}. Write jax.numpy.bfloat16, or 'bfloat16'."
        ) from None


def _cast(y: Any, dtype: Any) -> jax.Array:
    same = isinstance(y, jax.Array) and y.dtype == dtype  # a key has no other dtype
    return y if same else jnp.asarray(y, dtype)


def _nothing_to_cast(dtype: Any, products: Counter) -> str:
    found = ", ".join(f"{n} in {t}" for t, n in products.items()) or "none at all"
    return (
        f"nothing runs in {dtype}: autocast casts products of float32 arrays with no "
        f"explicit precision, and found these products: {found}. Call fn without it."
    )
