"""Powers of a vector that weights are multiplied with, as sums over unknowns.

What `scalings.py` carries through a program, and how its equations are solved.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from .dims import Dim

# A power of s as a sum over unknowns: the powers of weights.
Power = Mapping[int, Fraction]
# For the atoms of an array, with which power of s it is multiplied along each.
Powers = dict[Dim, Power]


class Known:
    """What is known of an array: its powers, and its value if it is one number."""

    def __init__(self, powers: Powers, constant: float | None = None):
        self.powers, self.constant = powers, constant


def add(*several: Power, signs: Sequence[Fraction | int] | None = None) -> Power:
    """The sum of powers, each times a number."""
    total: dict[int, Fraction] = {}
    for p, sign in zip(several, signs or [1] * len(several), strict=True):
        for k, x in p.items():
            total[k] = total.get(k, Fraction(0)) + sign * x
    return {k: x for k, x in total.items() if x}


def null_space(rows: list[Power], unknown: list[int]) -> list[dict[int, int]]:
    """Integer solutions of linear equations, one for each that can be chosen."""
    pivots: dict[int, Power] = {}
    for row in rows:
        for p, known in pivots.items():
            if p in row:
                row = add(row, known, signs=[1, -row[p]])
        if row:
            # The last unknown is expressed by those before it.
            p = max(row)
            row = add(row, signs=[1 / row[p]])
            for q in list(pivots):
                if p in pivots[q]:
                    pivots[q] = add(pivots[q], row, signs=[1, -pivots[q][p]])
            pivots[p] = row
    out = []
    for free in (i for i in unknown if i not in pivots):
        vector = {free: Fraction(1)}
        for p, row in pivots.items():
            if free in row:
                vector[p] = -row[free]
        scale = int(np.lcm.reduce([x.denominator for x in vector.values()]))
        out.append({i: int(x * scale) for i, x in sorted(vector.items())})
    return out
