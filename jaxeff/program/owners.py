"""Which weight an array is stored for, told by paths: moments, averages, states.

An optimizer keeps `0/mu/params/up/kernel` for `params/up/kernel`, and `0/mu/up/kernel`
where it was given `variables["params"]` alone; other trees put a name behind
(`up/kernel/value`). One path can mean several weights, all paths of a state together
hardly ever do.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from typing import NamedTuple


class _Way(NamedTuple):
    """How paths of a state come from those of weights: start + rest + last."""

    start: str  # before: 0/mu
    left_out: str  # of the weight's own path, its beginning
    last: str  # behind, at most one part


def owners(
    names: Collection[str],
    weights: Collection[str],
    fits: Callable[[str, str], bool] = lambda name, weight: True,
) -> dict[str, list[str]]:
    """For the paths of arrays the weights they are stored for.

    Of several ways to read a path the one counts that explains the most paths, then
    the one that finds the most of a weight's path in it.

    Args:
        names: paths of arrays.
        weights: paths of weights.
        fits: whether an array may be of a weight, by their paths; asked where the
            array's path does not hold all of the weight's.

    Returns:
        For each name no weight, the one, or several, which no way tells apart.
    """
    ends: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for weight in weights:
        parts = weight.split("/")
        for i in range(len(parts)):
            ends["/".join(parts[i:])].append(("/".join(parts[:i]), weight))
    ways = {name: [*_ways(name, ends, fits)] for name in names}
    found = Counter(way for read in ways.values() for way, _ in read)
    rank = lambda way: (found[way], -len(way.start) - len(way.last))
    owners = {}
    for name, read in ways.items():
        best = max((rank(way) for way, _ in read), default=None)
        owners[name] = sorted({weight for way, weight in read if rank(way) == best})
    return owners


def _ways(name, ends, fits):
    parts = name.split("/")
    for stop in (len(parts), len(parts) - 1):
        for i in range(stop):
            for left_out, weight in ends.get("/".join(parts[i:stop]), ()):
                if (left_out == "" and stop == len(parts)) or fits(name, weight):
                    start, last = "/".join(parts[:i]), "/".join(parts[stop:])
                    yield _Way(start, left_out, last), weight
