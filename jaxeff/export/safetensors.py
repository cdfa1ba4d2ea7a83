"""Models, dense or compressed, in one safetensors file.

Arrays are stored under their paths, those of a compressed weight under its path and
their own names (`params/Dense_0/kernel/values`), so that any reader of the format sees
codes and scales. What was done to the function and to each weight is in the metadata,
as JSON, and needs nothing but this library to be read back.

Format: github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxeff import tree
from jaxeff.program import describe, rebuild, write_file

_ABOUT = "jaxeff"
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def save_safetensors(
    path: str | Path,
    fn: Callable,
    params: PyTree,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model, dense or compressed in whatever way.

    The file is written whole or not at all; one that is there is replaced.

    Args:
        path: of the file; its folder is made where missing.
        fn: the function that a technique returned, or the model's own.
        params: its parameters, whole on this process.
        meta: anything JSON can hold, given back by `load_safetensors`.

    Raises:
        ImportError: the package safetensors is missing.
        ValueError: `fn` hides how it was rewritten, see `program.describe`; an array
            has a dtype that the format lacks, or `meta` is no JSON.
    """
    safetensors = _package()
    about = {"compression": describe(fn, params), "user": dict(meta or {})}
    try:
        told = json.dumps(about)
    except TypeError as error:
        raise ValueError(
            f"meta is anything JSON can hold, but {error}: store it as numbers, "
            "strings, lists and dicts."
        ) from None
    arrays = {}
    for name, x in _arrays(params).items():
        if str(x.dtype) not in _DTYPES.values():
            raise ValueError(
                f"safetensors files hold {', '.join(sorted(_DTYPES.values()))}, but "
                f"{name} is {x.dtype}: convert it, or save with save_model."
            )
        arrays[name] = np.asarray(jax.device_get(x), order="C")
    data = safetensors.numpy.save(arrays, {_ABOUT: told})
    write_file(path, lambda file: file.write(data))


def load_safetensors(
    path: str | Path, fn: Callable, params: PyTree
) -> tuple[Callable, PyTree, dict[str, Any]]:
    """A model that `save_safetensors` saved: function, parameters and meta.

    Args:
        path: of the file.
        fn: the original model's function (or another of its functions).
        params: the original model's parameters, or their shapes
            (`jax.eval_shape(model.init, key, x)`).

    Raises:
        ImportError: the package safetensors is missing.
        FileNotFoundError: no such file.
        ValueError: it is damaged, of another program, or of another model.
    """
    safetensors = _package()
    data = Path(path).read_bytes()
    try:
        found = dict(safetensors.deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} of {len(data)} bytes is no whole safetensors file ({error}). "
            "Fetch or save it again."
        ) from None
    stored = header.get("__metadata__", {}).get(_ABOUT)
    if stored is None:
        raise ValueError(
            f"{path} holds tensors but not what model they are of: it was not written "
            "by save_safetensors."
        )
    about = json.loads(stored)
    fn, shapes = rebuild(about["compression"], fn, params)
    wanted = _arrays(shapes)
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or extra:
        raise ValueError(
            f"{path} is of another model: it lacks {_few(missing)} of this one, which "
            f"lacks {_few(extra)} of it. Build the model that was saved."
        )
    arrays = {name: _array(name, found[name], like) for name, like in wanted.items()}
    return fn, tree.replaced(shapes, arrays), about["user"]


def _array(name: str, found: Mapping[str, Any], like: Any) -> jax.Array:
    dtype, shape = _DTYPES.get(found["dtype"], found["dtype"]), tuple(found["shape"])
    if (shape, dtype) != (tuple(like.shape), str(like.dtype)):
        raise ValueError(
            f"{name} is {dtype} {shape} in the file and {like.dtype} "
            f"{tuple(like.shape)} in this model. Build the model that was saved."
        )
    return jnp.asarray(np.frombuffer(found["data"], jnp.dtype(dtype)).reshape(shape))


def _arrays(params: PyTree) -> dict[str, Any]:
    return {name: x for name, x in tree.paths(params).items() if tree.is_array(x)}


def _few(names: set[str]) -> str:
    if not names:
        return "nothing"
    some = sorted(names)
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" * (len(some) > 3))


def _package() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "Safetensors files need the package safetensors. Install it with "
            "`pip install jaxeff[export]`.",
            name="safetensors",
        ) from None
    return safetensors
