"""jaxeff: JAX models, cheaper to train and cheaper to run.

Every technique has one form, `technique(fn, params, *args) -> (fn, params)`, and
lives in a package of its own: `jaxeff.pruning`, `jaxeff.quantization`,
`jaxeff.lowrank`, `jaxeff.distillation`, `jaxeff.precision`,
`jaxeff.parallelism`, `jaxeff.cost`. Here is what they share; the packages are
imported when they are first asked for.
"""

import importlib
from types import ModuleType

from .program import (
    functional as functional,
    lift as lift,
    lift_report as lift_report,
    observe as observe,
    resize as resize,
    trace as trace,
)
from .tree import combine as combine, partition as partition

_PACKAGES = (
    "cost",
    "data",
    "distillation",
    "export",
    "lowrank",
    "models",
    "parallelism",
    "precision",
    "program",
    "pruning",
    "quantization",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    """A package, imported now."""
    if name in _PACKAGES:
        return importlib.import_module(f"jaxeff.{name}")
    raise AttributeError(f"module 'jaxeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
