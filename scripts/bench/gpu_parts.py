"""What `gpu.py` measures, each part a function of its sizes.

Training is the library's own step on a LLaMA; products are the compiler's; the
compressed models are those of `jaxeff.pruning` and `jaxeff.quantization`.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.cost import (
    chip,
    count_parameters,
    device_memory,
    measure_latency,
    mfu,
    peak_memory,
    transformer_training_flops,
)
from jaxeff.models import Llama, LlamaConfig
from jaxeff.program import dense, trace, zero_indices
from jaxeff.pruning import shrink
from jaxeff.quantization import quantize, w8a8
from jaxeff.training import forms, init_state, make_train_step
from jaxeff.training.language import language_loss
from jaxeff.tree import paths, tree_bytes

# Type of the operands, of the result, and how far its rounding may take the result, of
# its norm. Sums of integers are exact; fp8 is summed in fewer bits than float32.
PRODUCTS: dict[str, tuple[Any, Any, float]] = {
    "bf16": (jnp.bfloat16, jnp.bfloat16, 0.01),
    "int8": (jnp.int8, jnp.int32, 0.0),
    "fp8 e4m3": (jnp.float8_e4m3fn, jnp.bfloat16, 0.02),
}
# Of the norm of the logits. bfloat16 keeps three digits of what every layer gives;
# w8a8 also rounds what enters a product, to 1/127 of the largest in its row.
TOLERANCE = {"dense": 0.0, "shrunk": 0.05, "int8": 0.05, "w8a8": 0.15}


def measure_training(
    config: LlamaConfig,
    *,
    batch_size: int,
    sequence: int,
    steps: int,
    peak: float | None = None,
) -> dict[str, Any]:
    """A training step: bfloat16 products, float32 weights and AdamW, scan and remat.

    Args:
        config: of the LLaMA.
        batch_size: sequences per step.
        sequence: tokens in each.
        steps: timed ones, each until its result is ready.
        peak: dense bf16 FLOP/s of the device; where `None`, that of its name.
    """
    model = Llama(config, scan=True, remat=True, dtype=jnp.bfloat16)
    shape = (batch_size, sequence + 1)
    tokens = jr.randint(jr.key(1), shape, 0, config.vocab_size)
    tx = optax.adamw(3e-4)
    _, train_fn = forms(model, {})
    step: Any = make_train_step(language_loss(train_fn), tx)
    # In one program, or weights and moments would exist twice.
    start = lambda key: init_state(model.init(key, tokens[:1, :-1]), tx, key)
    state = jax.jit(start)(jr.key(0))
    began = time.perf_counter()
    compiled = step.lower(state, tokens).compile()
    compile_seconds = time.perf_counter() - began
    seconds, losses = [], []
    for _ in range(2 + steps):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, tokens))
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    low, median, high = np.quantile(seconds[2:], (0.25, 0.5, 0.75)).tolist()

    count = batch_size * sequence
    planned, reached = peak_memory(compiled), device_memory()
    found = {
        "parameters": count_parameters(state.params),
        "dtype": "bfloat16 products; float32 weights, gradients and moments",
        "batch_size": batch_size,
        "sequence": sequence,
        "steps": steps,
        "compile_seconds": compile_seconds,
        "seconds_per_step": median,
        "quartiles": [low, high],
        "tokens_per_second": count / median,
        "mfu": utilisation(config, state.params, batch_size, sequence, median, peak),
        "peak_bytes": reached.bytes,
        "peak_bytes_method": reached.method,
        "planned_bytes": planned.bytes,
        "planned_bytes_method": planned.method,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        # The same tokens again and again: they have to be learnt.
        "right": bool(math.isfinite(losses[-1]) and losses[-1] < losses[0]),
    }
    print(
        f"training: {found['parameters']:,} parameters, {count:,} tokens per step, "
        f"{1e3 * median:.1f} ms per step, {count / median:,.0f} tokens/s; "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    for how in found["mfu"]:
        print(f"training: {how['said']}")
    if reached.bytes is not None:
        print(f"training: peak memory {reached.bytes / 2**30:.1f} GiB")
    return found


def utilisation(
    config: LlamaConfig,
    params: Any,
    batch_size: int,
    sequence: int,
    seconds: float,
    peak: float | None,
) -> list[dict[str, Any]]:
    """MFU by both usual conventions; none where the device's peak is not known."""
    try:
        at_most = chip(jax.devices()[0].device_kind) if peak is None else peak
    except ValueError as error:
        print(f"training: no MFU: {error} Here with --peak.")
        return []
    multiply = sum(x.size for p, x in paths(params).items() if p.endswith("/kernel"))
    found = []
    for causal in (True, False):
        flops, convention = transformer_training_flops(
            multiply,
            batch_size * sequence,
            layers=config.n_layers,
            heads=config.n_heads,
            head_dim=config.head_dim,
            sequence=sequence,
            causal=causal,
        )
        used = mfu(flops, seconds, at_most, convention=convention)
        found.append(
            {
                "fraction": used.fraction,
                "convention": convention,
                "peak_flops_per_second": used.peak,
                "chip": used.chip,
                "flops_per_step": flops,
                "said": str(used),
            }
        )
    return found


def measure_products(
    sizes: Sequence[int], *, calls: int, repeats: int, max_seconds: float
) -> dict[str, Any]:
    """Square matrix products of random numbers, the types in turns.

    Args:
        sizes: n of (n, n) @ (n, n).
        calls: queued at once, so that the time to start one does not count.
        repeats: of that, per type.
        max_seconds: per size.
    """
    found: dict[str, Any] = {}
    for n in sizes:
        ready: dict[str, dict[str, Any]] = {}
        thunks = {}
        for name in PRODUCTS:
            try:
                thunks[name], ready[name] = make_product(name, n, calls)
            except Exception as error:  # whatever a compiler says of a type it lacks
                said = str(error).strip().splitlines() or [""]
                ready[name] = {"failed": f"{type(error).__name__}: {said[0][:300]}"}
        timing = {"repeats": repeats, "max_seconds": max_seconds}
        for name, t in measure_latency(thunks, **timing).items():
            ready[name] |= {
                "seconds": t.median / calls,
                "quartiles": [t.low / calls, t.high / calls],
                "tera_operations_per_second": 2e-12 * n**3 * calls / t.median,
            }
        found[str(n)] = ready
        for name, row in ready.items():
            rate = row.get("tera_operations_per_second")
            said = row["failed"] if rate is None else f"{rate:8.1f} T operations/s"
            print(f"product {n:6} {name:9} {said}")
    rows = [row for ready in found.values() for row in ready.values()]
    return {"sizes": found, "right": all(row.get("right", True) for row in rows)}


def make_product(
    name: str, n: int, calls: int
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Several products in a row, and whether the first is right."""
    operand, result, tolerance = PRODUCTS[name]

    def draw(key):
        if operand == jnp.int8:
            return jr.randint(key, (n, n), -127, 128, jnp.int8)
        return jr.normal(key, (n, n), jnp.bfloat16).astype(operand)

    a, b = (jax.jit(draw)(key) for key in jr.split(jr.key(n)))
    product = lambda a, b: jax.lax.dot(a, b, preferred_element_type=result)
    compiled = jax.jit(product).lower(a, b).compile()

    def run():
        y = compiled(a, b)
        for _ in range(calls - 1):
            y = compiled(a, b)
        return y

    # A corner of it again, exactly.
    exact = np.float64 if operand != jnp.int8 else np.int64
    rows, columns = np.asarray(a[:8]).astype(exact), np.asarray(b[:, :64]).astype(exact)
    want = rows @ columns
    error = relative(np.asarray(compiled(a, b)[:8, :64]).astype(np.float64), want)
    text = compiled.as_text() or ""
    ran_as = re.findall(r'custom_call_target="([^"]+)"|"kind":"(__[^"]+)"', text)
    return run, {
        "error": error,
        "tolerance": tolerance,
        "right": error <= tolerance,
        # Whether a library or the compiler's own kernel did it, and in which type.
        "ran_as": sorted({a or b for a, b in ran_as}),
    }


def relative(y: Any, want: Any) -> float:
    """The norm of the difference, of the norm of what is wanted."""
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def measure_forward(
    config: LlamaConfig,
    *,
    workloads: Mapping[str, tuple[int, int]],
    repeats: int,
    max_seconds: float,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """The compressed LLaMA against the dense one, in turns.

    Each is compared with the dense function on the weights it stands for: the shrunk
    model with the removed channels set to zero, a quantized one with its integers
    times their scales.

    Args:
        config: of the LLaMA.
        workloads: by name, sequences at a time and tokens in each.
        repeats: timed calls of each model.
        max_seconds: per workload.
        dtype: of weights and products.
    """
    model = Llama(config, scan=True, dtype=dtype, param_dtype=dtype)
    few = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jr.key(0), few)
    halved = zero_half(model.apply, params, few)
    models: dict[str, tuple[Callable, Any]] = {
        "dense": (model.apply, params),
        # Half of everything is zero already, so that half is what goes.
        "shrunk": shrink(model.apply, halved, few, keep=0.5),
        "int8": quantize(model.apply, params, few),
        "w8a8": quantize(model.apply, params, few, formats={"**": w8a8}),
    }
    found: dict[str, Any] = {}
    for name, shape in workloads.items():
        tokens = jr.randint(jr.key(2), shape, 0, config.vocab_size)
        rows: dict[str, dict[str, Any]] = {}
        thunks = {}
        for kind, (fn, weights) in models.items():
            run = jax.jit(fn)
            thunks[kind] = lambda f=run, w=weights, x=tokens: f(w, x)
            exact = halved if kind == "shrunk" else dense(weights)
            want = np.asarray(jax.jit(model.apply)(exact, tokens), np.float32)
            del exact  # two models on the device are enough
            error = relative(np.asarray(thunks[kind](), np.float32), want)
            rows[kind] = {
                "bytes": tree_bytes(weights),
                "parameters": count_parameters(weights),
                "error": error,
                "right": error <= TOLERANCE[kind],
            }
        times = measure_latency(thunks, repeats=repeats, max_seconds=max_seconds)
        for kind, t in times.items():
            rows[kind] |= {
                "seconds": t.median,
                "quartiles": [t.low, t.high],
                "tokens_per_second": math.prod(shape) / t.median,
                "ratio": t.median / times["dense"].median,
            }
            print(
                f"forward {name}: {kind:7} {1e3 * t.median:9.3f} ms  x "
                f"{rows[kind]['ratio']:.3f}  {rows[kind]['bytes'] / 1e9:6.3f} GB  "
                f"error {rows[kind]['error']:.1e}"
            )
        found[name] = rows
    every = [row for rows in found.values() for row in rows.values()]
    return {
        "dtype": jnp.dtype(dtype).name,
        "tolerance": TOLERANCE,
        "workloads": found,
        "peak_bytes": device_memory().bytes,
        "right": all(row["right"] for row in every),
    }


def zero_half(fn: Callable, params: Any, *args: Any) -> Any:
    """The weights with a random half of every coupling's indices set to zero."""
    couplings = trace(fn, params, *args).couplings
    rng = np.random.default_rng(0)
    keep = {
        c.name: rng.permutation(c.size) < max(1, round(0.5 * c.size))
        for c in couplings.free
    }
    return zero_indices(params, couplings, keep)
