"""A schedule as integers: what each device runs, reads and keeps, lane by lane.

Whatever waits on a device has a place from the time it comes until it is last read, and
the places of a kind are as many as are in use at a time. So memory follows from the
schedule, and the program that runs it only looks places up.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .schedules import Op, Schedule

KINDS = "FBIW"
# A longer list of differing ticks is run as if all were alike: each differing tick is
# compiled for itself.
MOST_SEGMENTS = 8


class Row(NamedTuple):
    """What a device does in a lane; places that are not used are out of range.

    Attributes:
        kind: 0 is idle, else one more than the place in `KINDS`.
        chunk: which of the device's stages.
        microbatch: which one.
        input: place of the stage's input.
        cotangent: place of the gradient of its result; for the last stage, of the
            result, from which the head computes it.
        own: where the last stage puts its result.
        kept: place of what the forward leaves for the backward.
        handed: place of what the first half of a backward leaves for the second.
        came_input: where to put what the device before it sends.
        came_cotangent: where to put what the device after it sends.
    """

    kind: Any
    chunk: Any
    microbatch: Any
    input: Any
    cotangent: Any
    own: Any
    kept: Any
    handed: Any
    came_input: Any
    came_cotangent: Any


class Lane(NamedTuple):
    """What some device does in a lane: the kinds of operations, and what is sent."""

    kinds: str
    sends_inputs: bool
    sends_cotangents: bool


class Places(NamedTuple):
    """How many places each device has for what waits."""

    input: int
    cotangent: int
    kept: int
    handed: int


@dataclasses.dataclass(frozen=True)
class Table:
    """A schedule, ready to be run.

    Attributes:
        rows: integers (ticks, lanes, devices) each.
        lanes: for each tick its lanes.
        places: on each device.
    """

    rows: Row
    lanes: tuple[tuple[Lane, ...], ...]
    places: Places

    def segments(self) -> Iterator[tuple[int, int, tuple[Lane, ...]]]:
        """Runs of ticks whose lanes are alike: from, to, and the lanes."""
        runs = [(what, len(list(run))) for what, run in itertools.groupby(self.lanes)]
        if len(runs) > MOST_SEGMENTS:
            both = lambda a, b: tuple(map(_either, a, b))
            runs = [(functools.reduce(both, self.lanes), len(self.lanes))]
        at = 0
        for what, length in runs:
            yield at, at + length, what
            at += length

    @property
    def sent(self) -> int:
        """How often the program hands inputs or cotangents on, all devices at once."""
        return sum(
            (end - begin) * (lane.sends_inputs + lane.sends_cotangents)
            for begin, end, lanes in self.segments()
            for lane in lanes
        )

    @property
    def needed(self) -> int:
        """How often some device has something to hand on."""
        return sum(
            lane.sends_inputs + lane.sends_cotangents
            for lanes in self.lanes
            for lane in lanes
        )


def make_table(schedule: Schedule) -> Table:
    """The table of a schedule that `Schedule.check` finds in order."""
    schedule.check()
    p, last = schedule.devices, schedule.stages - 1
    lanes = len(schedule.ops[0])
    when = {
        op: t * lanes + at
        for t, tick in enumerate(schedule.ops)
        for at, lane in enumerate(tick)
        for op in lane
        if op is not None
    }
    in_two = any(op.kind == "W" for op in when)
    back, end = ("I", "W") if in_two else ("B", "B")
    stays: dict[str, dict[tuple[int, int], tuple[int, int]]] = {
        name: {} for name in Places._fields
    }
    for k in range(schedule.stages):
        for n in range(schedule.microbatches):
            ahead, gradient = when[Op("F", k, n)], when[Op(back, k, n)]
            if k > 0:
                stays["input"][k, n] = when[Op("F", k - 1, n)] + 1, ahead
            came = ahead if k == last else when[Op(back, k + 1, n)]
            stays["cotangent"][k, n] = came + 1, gradient
            stays["kept"][k, n] = ahead, when[Op(end, k, n)]
            if in_two:
                stays["handed"][k, n] = gradient, when[Op("W", k, n)]
    at, counts = {}, {}
    for name, of in stays.items():
        at[name], counts[name] = _assign(of, p)
    # An array has one place at least, also where nothing waits.
    places = Places(**{name: max(1, n) for name, n in counts.items()})
    shape = (schedule.ticks, lanes, p)
    unused = Row(
        *(np.zeros(shape, np.int32) for _ in range(3)),
        input=np.full(shape, places.input, np.int32),
        cotangent=np.full(shape, places.cotangent, np.int32),
        own=np.full(shape, places.cotangent, np.int32),
        kept=np.full(shape, places.kept, np.int32),
        handed=np.full(shape, places.handed, np.int32),
        came_input=np.full(shape, places.input, np.int32),
        came_cotangent=np.full(shape, places.cotangent, np.int32),
    )
    for (kind, k, n), now in when.items():
        here = (*divmod(now, lanes), k % p)
        unused.kind[here] = KINDS.index(kind) + 1
        unused.chunk[here], unused.microbatch[here] = k // p, n
        for name in Places._fields:
            if (k, n) in at[name]:
                getattr(unused, name)[here] = at[name][k, n]
        if kind == "F" and k == last:
            unused.own[here] = at["cotangent"][k, n]
        elif kind == "F":
            there = (*here[:2], (k + 1) % p)
            unused.came_input[there] = at["input"][k + 1, n]
        elif kind == back and k > 0:
            there = (*here[:2], (k - 1) % p)
            unused.came_cotangent[there] = at["cotangent"][k - 1, n]
    what = tuple(
        tuple(
            Lane(
                "".join(kind for i, kind in enumerate(KINDS) if i + 1 in row.kind),
                bool((row.came_input < places.input).any()),
                bool((row.came_cotangent < places.cotangent).any()),
            )
            for row in (Row(*(a[t, lane] for a in unused)) for lane in range(lanes))
        )
        for t in range(schedule.ticks)
    )
    return Table(unused, what, places)


def _assign(
    stays: dict[tuple[int, int], tuple[int, int]], devices: int
) -> tuple[dict[tuple[int, int], int], int]:
    """For each (stage, microbatch) a place on its device, and how many there are."""
    place, most = {}, 0
    for d in range(devices):
        free: list[int] = []
        leaving: list[tuple[int, int]] = []
        used = 0
        mine = [(span, key) for key, span in stays.items() if key[0] % devices == d]
        for (begin, end), key in sorted(mine):
            while leaving and leaving[0][0] < begin:
                heapq.heappush(free, heapq.heappop(leaving)[1])
            if free:
                place[key] = heapq.heappop(free)
            else:
                place[key], used = used, used + 1
            heapq.heappush(leaving, (end, place[key]))
        most = max(most, used)
    return place, most


def _either(a: Lane, b: Lane) -> Lane:
    kinds = "".join(k for k in KINDS if k in a.kinds + b.kinds)
    return Lane(
        kinds,
        a.sends_inputs or b.sends_inputs,
        a.sends_cotangents or b.sends_cotangents,
    )
