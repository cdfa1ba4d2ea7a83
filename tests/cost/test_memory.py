import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from jaxeff.cost import count_parameters, device_memory, peak_memory
from jaxeff.program import Leaf
from jaxeff.tree import pytree, static


@pytree
class Int8(Leaf):
    values: Array
    scale: Array

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.scale.dtype)

    def dense(self):
        return self.values * self.scale


@pytree
class Packed(Int8):
    """Two four-bit values per byte."""

    shape = property(lambda self: (*self.values.shape[:-1], 2 * self.values.shape[-1]))


@pytree
class Factors(Leaf):
    u: Array | Leaf
    v: Array | Leaf
    name: str = static(default="")

    shape = property(lambda self: (self.u.shape[0], self.v.shape[1]))
    dtype = property(lambda self: self.u.dtype)

    def dense(self):
        return self.u @ self.v


def int8(*shape):
    return Int8(jnp.zeros(shape, jnp.int8), jnp.ones((shape[0], 1)))


def test_a_quantized_weight_counts_what_it_stands_for():
    assert count_parameters({"w": int8(6, 4), "b": jnp.zeros(4)}) == 28
    packed = Packed(jnp.zeros((6, 2), jnp.uint8), jnp.ones((6, 1)))
    assert count_parameters({"w": packed}) == 24


def test_a_factored_weight_counts_its_factors():
    u, v = jnp.zeros((10, 2)), jnp.zeros((2, 8))
    assert count_parameters({"w": Factors(u, v)}) == 36
    assert count_parameters({"w": Factors(int8(10, 2), int8(2, 8))}) == 36


def test_what_is_no_array_has_no_parameters():
    assert count_parameters({"w": jnp.zeros((2, 3)), "flag": True, "n": None}) == 6


def test_peak_holds_at_least_arguments_and_outputs():
    x = jnp.ones((64, 32))
    compiled = jax.jit(lambda a: (a @ a.T, a + 1)).lower(x).compile()
    memory = peak_memory(compiled)
    assert memory.bytes >= 4 * (64 * 32 + 64 * 64 + 64 * 32)
    assert memory.method.startswith("compiler's plan")


def test_peak_grows_with_what_must_live_at_once():
    def steps(x):
        a, b = x @ x, x @ x.T
        return a @ b

    peak = lambda n: peak_memory(jax.jit(steps).lower(jnp.ones((n, n))).compile()).bytes
    assert peak(64) > 3 * peak(32)


@dataclasses.dataclass
class Stats:
    argument_size_in_bytes: int = 100
    output_size_in_bytes: int = 50
    temp_size_in_bytes: int = 30
    alias_size_in_bytes: int = 20
    peak_memory_in_bytes: int = 0


def compiled(stats):
    return types.SimpleNamespace(memory_analysis=lambda: stats)


def test_the_parts_are_added_and_what_is_aliased_counts_once():
    memory = peak_memory(compiled(Stats()))
    assert memory.bytes == 100 + 50 + 30 - 20
    assert memory.method.endswith("argument + output + temp - alias")
    assert memory.compiler_peak is None
    assert peak_memory(compiled(Stats(peak_memory_in_bytes=145))).compiler_peak == 145


def test_a_backend_that_tells_nothing_gives_none_with_the_reason():
    memory = peak_memory(compiled(None))
    assert memory.bytes is None
    assert "no memory analysis" in memory.method


def test_a_function_that_is_not_compiled_is_refused():
    with pytest.raises(ValueError, match="lower"):
        peak_memory(jax.jit(lambda x: x))


def test_device_memory_is_the_allocators_peak_or_none():
    device = types.SimpleNamespace(
        device_kind="Some GPU", memory_stats=lambda: {"peak_bytes_in_use": 7}
    )
    assert device_memory(device).bytes == 7
    silent = types.SimpleNamespace(device_kind="Some CPU", memory_stats=lambda: None)
    assert device_memory(silent).bytes is None
    assert "Some CPU" in device_memory(silent).method
    assert "device" in device_memory().method or "allocator" in device_memory().method
