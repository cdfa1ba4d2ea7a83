"""Where bytes go: stored parameters, a compiled program's peak, a device's peak.

Three different questions. What a model weighs on disk and in memory
(`count_parameters` here, `jaxeff.tree.tree_bytes`), what one call needs at most
(`peak_memory`, from the compiler's own plan, no run needed), and what a device held
at most since the process began (`device_memory`, from the allocator).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxeff.program import is_leaf, Leaf
from jaxeff.tree import is_array


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, or `None` where the backend does not tell; `method` says which."""

    bytes: int | None
    method: str
    compiler_peak: int | None = None  # `peak_memory_in_bytes`, where there is one


def count_parameters(params: PyTree) -> int:
    """Numbers a model is made of.

    A factored weight counts its factors, for they are what is left of it. A
    quantized weight counts the weights it stands for: four bits instead of 32
    make a parameter smaller, not fewer (and its scales are no parameters). Of
    Linen's variables, those in `params` count: running statistics do not.
    """
    if is_variables(params):
        params = params["params"]
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    return sum(_count(x) for x in leaves)


def is_variables(params: PyTree) -> bool:
    """Whether these are Linen's variables, with `params` and other collections."""
    return isinstance(params, Mapping) and "params" in params


def _count(x: Any) -> int:
    if not isinstance(x, Leaf):
        return int(np.prod(x.shape)) if is_array(x) else 0
    parts = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    arrays = [p for p in parts if is_array(p)]
    if any(isinstance(p, Leaf) for p in parts):
        return sum(_count(p) for p in parts)
    if any(not jnp.issubdtype(a.dtype, jnp.inexact) for a in arrays):
        return x.size
    return sum(_count(a) for a in arrays)


def peak_memory(compiled: Any) -> Memory:
    """Bytes of device memory one call of a compiled program needs at most.

    Arguments and outputs are counted, per device.

    Args:
        compiled: `jax.jit(fn).lower(...).compile()`.
    """
    analyse = getattr(compiled, "memory_analysis", None)
    if analyse is None:
        raise ValueError(
            f"peak_memory reads the plan of a compiled program, got "
            f"{type(compiled).__name__}: pass jax.jit(fn).lower(*args).compile()."
        )
    stats = analyse()
    if stats is None:
        return Memory(None, "the backend gives no memory analysis")
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )
    # Not `peak_memory_in_bytes` alone: on the CPU it leaves the temporaries out.
    peak = getattr(stats, "peak_memory_in_bytes", 0) or None
    return Memory(int(total), "compiler's plan: argument + output + temp - alias", peak)


def device_memory(device: Any = None) -> Memory:
    """Bytes a device held at most since the process began, from its allocator.

    Args:
        device: a JAX device; the first local one where `None`.
    """
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats()
    if not stats or "peak_bytes_in_use" not in stats:
        return Memory(None, f"{device.device_kind} keeps no allocator statistics")
    return Memory(
        int(stats["peak_bytes_in_use"]),
        f"allocator's peak on {device.device_kind} since the process began",
    )
