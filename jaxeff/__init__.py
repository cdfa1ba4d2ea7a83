"""jaxeff: JAX models, cheaper to train and cheaper to run.

Every technique has one form, `technique(fn, params, *args) -> (fn, params)`, and
lives in a package of its own: `jaxeff.pruning`, `jaxeff.quantization`,
`jaxeff.lowrank`, `jaxeff.distillation`, `jaxeff.precision`,
`jaxeff.parallelism`, `jaxeff.cost`. Here is what they share.
"""

from .program import (
    functional as functional,
    lift as lift,
    lift_report as lift_report,
    observe as observe,
    resize as resize,
    trace as trace,
)
from .tree import combine as combine, partition as partition
