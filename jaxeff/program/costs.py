"""What a program costs: FLOPs and bytes moved, in all and by weight.

Counted on the trace and multiplied by the trip counts of its scans, where the
compiler counts the body of a loop once. Bytes are those of each operation's
operands and results, as if nothing were fused: an upper bound.
"""

import dataclasses
from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr

from .flops import equation_flops, equation_transcendentals, MATMULS
from .sites import equation_bytes, Site
from .walk import bodies, equations


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of some operations."""

    flops: int  # a multiply-add is 2
    bytes: int  # operands read once, results written once, per operation


@dataclasses.dataclass(frozen=True)
class Costs:
    """The cost of a program.

    Attributes:
        flops: all floating-point operations; a multiply-add is 2.
        matmul_flops: those of products and convolutions alone.
        transcendentals: evaluations of `exp` and its like, counted apart.
        bytes: read and written by all operations, if none were fused.
        weights: the cost of the sites of each weight, by path.
        unknown_loops: how many `while` loops were counted as one turn.
    """

    flops: int
    matmul_flops: int
    transcendentals: int
    bytes: int
    weights: dict[str, Cost]
    unknown_loops: int


def count(jaxpr: ClosedJaxpr, sites: Sequence[Site] = ()) -> Costs:
    """Counts a program.

    All branches of a `cond` count, one turn of a `while`, and what one device does
    inside a `shard_map`.
    """
    flops = matmul_flops = transcendentals = moved = loops = 0
    for where, eqn, times in equations(jaxpr):
        runs = 1 if times is None else times
        loops += eqn.primitive.name == "while"
        if bodies(eqn, where):
            continue  # what is inside is counted
        n = equation_flops(eqn) * runs
        flops += n
        matmul_flops += n if eqn.primitive.name in MATMULS else 0
        transcendentals += equation_transcendentals(eqn) * runs
        moved += equation_bytes(eqn) * runs
    weights: dict[str, Cost] = {}
    for site in sites:
        old = weights.get(site.path, Cost(0, 0))
        weights[site.path] = Cost(old.flops + site.flops, old.bytes + site.bytes)
    return Costs(flops, matmul_flops, transcendentals, moved, weights, loops)
