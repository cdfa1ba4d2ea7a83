"""Where parameters, bytes and FLOPs are, layer by layer.

A layer is what holds some weights: `Dense_0` holds `Dense_0/kernel` and
`Dense_0/bias`. The names are the same for a model and its compressed versions, so
they can be laid side by side.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from jaxeff import program
from jaxeff.tree import paths, tree_bytes

from .memory import count_parameters, is_variables


def layer_costs(
    fn: Callable[..., Any], params: PyTree, *args: Any, examples: int = 1
) -> list[dict[str, Any]]:
    """What each layer of `fn(params, *args)` holds and computes.

    FLOPs are those of the products and convolutions with the layer's weights. A
    weight that is unpacked before it multiplies (int4) counts those of the dense
    weight it stands for, since it multiplies as that.

    Args:
        fn, params: the model, compressed or not.
        *args: arrays or their shapes.
        examples: how many predictions one call makes.

    Returns:
        One dict per layer, those that multiply in the order of the computation and
        then the others, with `path`,
        `parameters`, `bytes`, and `flops` per example.
    """
    weights = paths(params, is_leaf=program.is_leaf)
    flops = _weight_flops(fn, params, args, weights)
    collections = is_variables(params)
    layers: dict[str, dict[str, Any]] = {}
    used = [path for path in flops if path in weights]
    for path in [*used, *(p for p in weights if p not in flops)]:
        name = _layer(path, collections)
        layer = layers.setdefault(
            name, {"path": name, "parameters": 0, "bytes": 0, "flops": 0}
        )
        trains = not collections or path.startswith("params/")
        layer["parameters"] += count_parameters(weights[path]) if trains else 0
        layer["bytes"] += tree_bytes(weights[path])
        layer["flops"] += flops.get(path, 0)
    for layer in layers.values():
        layer["flops"] = round(layer["flops"] / examples)
    return list(layers.values())


def _layer(path: str, collections: bool) -> str:
    parts = path.split("/")
    parts = parts[1:] if collections and len(parts) > 1 else parts
    return "/".join(parts[:-1]) or parts[-1]


def _weight_flops(
    fn: Callable[..., Any], params: PyTree, args: Any, weights: dict[str, Any]
) -> dict[str, int]:
    """FLOPs by weight, in the order of first use."""
    costs = program.trace(fn, params, *args).costs.weights
    flops: dict[str, int] = {}
    for path, cost in costs.items():
        owner = _owner(path, weights)
        flops[owner] = flops.get(owner, 0) + cost.flops
    missing = [p for p, w in weights.items() if program.is_leaf(w) and not flops.get(p)]
    if missing:
        dense = program.trace(fn, program.shapes(params), *args).costs.weights
        filled = {p: dense[p].flops for p in dense if p in missing}
        # The dense trace knows the order of use of every weight.
        flops = {p: flops.get(p, 0) + filled.get(p, 0) for p in [*dense, *flops]}
    return flops


def _owner(path: str, weights: dict[str, Any]) -> str:
    """The weight that an array of a compressed leaf belongs to."""
    while path not in weights and "/" in path:
        path = path.rsplit("/", 1)[0]
    return path
