"""Consecutive items shared out among parts, so that the heaviest is as light as can be.

By dynamic programming, so what comes out is the optimum, or as near to it as was asked
for where that sends less from part to part.

Source: Pinar & Aykanat 2004, "Fast optimal load balancing algorithms for 1D
partitioning", section 2.
"""

from collections.abc import Sequence

import numpy as np


def balance(
    costs: Sequence[int | float],
    parts: int,
    sends: Sequence[int | float] | None = None,
    slack: int | float = 0.0,
) -> tuple[int, ...]:
    """How many items each part gets, 1 or more.

    Args:
        costs: of each item, 0 or more.
        parts: among which the items are shared out, in their order.
        sends: what it costs to have the end of a part after an item, for each but the
            last; the same everywhere by default.
        slack: how much heavier than the optimum the heaviest part may be, as a
            fraction, where the parts then send less. Among equals the more even.

    Raises:
        ValueError: there are fewer items than parts.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(
            f"{n} items can't be shared out among {parts} parts, which have 1 or more "
            "each. Take fewer parts."
        )
    upto = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])
    # Of the items i to j (without j) as one part.
    weight = upto[None, :] - upto[:, None]
    weight = np.where(np.tri(n + 1, dtype=bool), np.inf, weight)
    worst = weight[0]
    for _ in range(parts - 1):
        worst = np.maximum(worst[:, None], weight).min(0)
    # Sums of the same numbers in another order differ by rounding.
    limit = worst[n] * (1 + slack) + 1e-9 * upto[-1]
    ends = np.zeros(n + 1)
    ends[1:n] = 0.0 if sends is None else np.asarray(sends, float)
    ends /= max(ends.sum(), 1e-300)
    unit = max(upto[-1], 1e-300)
    # What is sent counts first; evenness decides where that is equal.
    price = ends[None, :] + 1e-6 * (weight / unit) ** 2
    price = np.where(weight <= limit, price, np.inf)
    total, came = price[0], []
    for _ in range(parts - 1):
        by = total[:, None] + price
        came.append(by.argmin(0))
        total = by.min(0)
    sizes, at = [], n
    for back in reversed(came):
        sizes.append(at - int(back[at]))
        at = int(back[at])
    return (at, *sizes[::-1])
