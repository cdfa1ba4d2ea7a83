"""Who computes what, and when, in a pipeline: a schedule is a table.

A pipeline of p devices cuts a model into v * p stages; stage k is on device k mod p.
A batch is cut into m microbatches. Time goes in ticks, and a tick in lanes; in each
lane every device runs one operation or is idle, and then hands its result on. As all
wait for all, a lane takes as long as its longest operation:

    gpipe(p, m)              all forwards, then all backwards
    one_f_one_b(p, m)        a backward as soon as there can be one
    one_f_one_b(p, m, v)     the same, with v stages on each device (interleaved)
    zero_bubble(p, m)        gradients of weights fill the gaps (ZB-H1)

`print(schedule)` draws it. `check` walks through it; `bubble` is the part of the time
in which a device is idle.

Sources: Huang et al. 2018, arXiv:1811.06965 (GPipe); Narayanan et al. 2021,
arXiv:2104.04473 (1F1B, interleaved); Qi et al. 2023, arXiv:2401.10241 (ZB-H1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# What an operation costs, in forwards of a stage. A whole backward is twice a forward.
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class Op(NamedTuple):
    """One operation of a stage on a microbatch.

    `kind` is "F", forward; "B", backward; or, where that is cut in two, "I" for the
    gradient of the input and "W" for that of the weights.
    """

    kind: str
    stage: int
    microbatch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table of operations: `ops[tick][lane][device]`, None where it is idle.

    Attributes:
        name: of the method.
        devices: p.
        microbatches: m.
        chunks: v, stages on each device.
    """

    name: str
    devices: int
    microbatches: int
    chunks: int
    ops: tuple[tuple[tuple[Op | None, ...], ...], ...]

    @property
    def stages(self) -> int:
        """Into how many parts the model is cut."""
        return self.devices * self.chunks

    @property
    def ticks(self) -> int:
        """Rows of the table."""
        return len(self.ops)

    def duration(self, costs: Mapping[str, float] = COSTS) -> float:
        """How long it takes, in the units of `costs`, an operation on one stage."""
        return sum(
            max((costs[op.kind] for op in lane if op is not None), default=0.0)
            for tick in self.ops
            for lane in tick
        )

    def bubble(self, costs: Mapping[str, float] = COSTS) -> float:
        """Fraction of the time in which a device is idle: mean over devices."""
        busy = sum(
            costs[op.kind]
            for tick in self.ops
            for lane in tick
            for op in lane
            if op is not None
        )
        return 1 - busy / (self.devices * self.duration(costs))

    def held(self) -> list[int]:
        """For each device, the most inputs of stages that it keeps at a time.

        An input is kept from its forward until nothing is computed from it any more.
        """
        now, most = [0] * self.devices, [0] * self.devices
        lets_go = "W" if any(op.kind == "W" for op in self.operations()) else "B"
        for tick in self.ops:
            for lane in tick:
                for d, op in enumerate(lane):
                    now[d] += op is not None and op.kind == "F"
                    most[d] = max(most[d], now[d])
                    now[d] -= op is not None and op.kind == lets_go
        return most

    def check(self) -> None:
        """Walks through the table.

        Raises:
            ValueError: an operation is missing, comes twice, is on another device, or
                runs before what it needs is there.
        """
        done: set[Op] = set()
        lanes = {len(tick) for tick in self.ops}
        if len(lanes) != 1:
            raise ValueError(f"every tick has as many lanes, but these have {lanes}.")
        for t, tick in enumerate(self.ops):
            for lane in tick:
                running = [(d, op) for d, op in enumerate(lane) if op is not None]
                for d, op in running:
                    if op.stage % self.devices != d:
                        raise ValueError(
                            f"stage {op.stage} is on device {op.stage % self.devices}, "
                            f"but tick {t} runs {_spell(op)} on device {d}."
                        )
                    if op in done:
                        raise ValueError(f"tick {t} runs {_spell(op)} once more.")
                    for need in needs(op, self.stages):
                        if not any(n in done for n in need):
                            raise ValueError(
                                f"tick {t} runs {_spell(op)}, but "
                                f"{' or '.join(map(_spell, need))} has not run."
                            )
                done |= {op for _, op in running}
        kinds = "FIW" if any(op.kind in "IW" for op in done) else "FB"
        want = {
            Op(kind, stage, n)
            for kind in kinds
            for stage in range(self.stages)
            for n in range(self.microbatches)
        }
        if missing := want - done:
            raise ValueError(f"{_spell(min(missing))} never runs.")
        if more := done - want:
            raise ValueError(f"{_spell(min(more))} is none of this schedule.")

    def operations(self) -> list[Op]:
        """All of them, in the order of time."""
        return [
            op for tick in self.ops for lane in tick for op in lane if op is not None
        ]

    def __str__(self) -> str:
        """A row for each device, a column for each lane of each tick."""
        wide = len(str(self.microbatches - 1)) + 1 + (self.chunks > 1)
        rows = []
        for d in range(self.devices):
            cells = []
            for tick in self.ops:
                lanes = [_cell(lane[d], self) for lane in tick]
                cells.append(" ".join(c.ljust(wide) for c in lanes))
            rows.append(f"device {d:<2} |{'|'.join(cells)}|")
        of = f", {self.chunks} stages on each" if self.chunks > 1 else ""
        return "\n".join(
            [
                f"{self.name}: {self.devices} devices{of}, "
                f"{self.microbatches} microbatches, {self.ticks} ticks, "
                f"bubble {self.bubble():.1%}, inputs held {max(self.held())}",
                *rows,
            ]
        )


def needs(op: Op, stages: int) -> list[tuple[Op, ...]]:
    """What must have run before: of each tuple, one."""
    kind, stage, n = op
    if kind == "F":
        return [(Op("F", stage - 1, n),)] if stage > 0 else []
    if kind == "W":
        return [(Op("I", stage, n),)]
    after = [(Op("B", stage + 1, n), Op("I", stage + 1, n))]
    return [(Op("F", stage, n),), *(after if stage < stages - 1 else [])]


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards: every input is held until the end.

    Raises:
        ValueError: a number is below 1.
    """
    start = microbatches + devices - 1
    return _two_lanes("GPipe", devices, microbatches, 1, start)


def one_f_one_b(devices: int, microbatches: int, chunks: int = 1) -> Schedule:
    """A backward as soon as there can be one; inputs held don't grow with m.

    Args:
        devices: p.
        microbatches: m.
        chunks: v, stages on each device; with more, the bubble is shorter, and more
            is sent.

    Raises:
        ValueError: a number is below 1, or with several chunks p does not divide m.
    """
    if chunks > 1 and microbatches % devices:
        raise ValueError(
            f"with {chunks} stages on each device, microbatches go in rounds of "
            f"{devices}, one for each, but {microbatches} is no multiple of that."
        )
    name = "interleaved 1F1B" if chunks > 1 else "1F1B"
    return _two_lanes(name, devices, microbatches, chunks, chunks * devices - 1)


def _two_lanes(name: str, p: int, m: int, v: int, start: int) -> Schedule:
    """A forward and a backward in each tick; the first backward in tick `start`.

    A device runs its forwards without a gap, one tick after the device before it: p
    microbatches through its first stage, the same through its second, and so on. Its
    backwards are the mirror image.
    """
    _positive(p, m, v)
    table: dict[tuple[int, int, int], Op] = {}
    for n in range(m):
        # Rounds of p microbatches; without rounds, one after another.
        turn, r = divmod(n, p) if v > 1 else (n, 0)
        first = turn * (p * v if v > 1 else 1) + r
        for c in range(v):
            for d in range(p):
                stage = c * p + d
                there = first + c * p + d
                back = start + first + (v - 1 - c) * p + p - 1 - d
                table[there, 0, d] = Op("F", stage, n)
                table[back, 1, d] = Op("B", stage, n)
    ticks = 1 + max(t for t, _, _ in table)
    row = lambda t, lane: tuple(table.get((t, lane, d)) for d in range(p))
    return Schedule(name, p, m, v, tuple((row(t, 0), row(t, 1)) for t in range(ticks)))


def zero_bubble(devices: int, microbatches: int) -> Schedule:
    """Backwards cut in two: gradients of weights, that none waits for, fill the gaps.

    Device d takes a forward if fewer than 3 (p-d) / 2, rounded down, of its
    microbatches wait for their gradient and fewer than p inputs are held; else the
    gradient of an input, that others wait for; else that of weights. With m >= p all
    that is idle is p-1 of 3 m + p-1, as published (tested for p up to 16), and no
    device holds more than 1F1B's first one.

    Raises:
        ValueError: a number is below 1.
    """
    _positive(devices, microbatches, 1)
    p, m = devices, microbatches
    done: set[Op] = set()
    count = {kind: [0] * p for kind in "FIW"}
    rows = []
    while len(done) < 3 * p * m:
        row: list[Op | None] = []
        for d in range(p):
            waiting = count["F"][d] - count["I"][d]
            held = count["F"][d] - count["W"][d]
            room = waiting < 3 * (p - d) // 2 and held < p
            row.append(_first_ready("FIW" if room else "IW", d, count, done, p, m))
        for d, op in enumerate(row):
            if op is not None:
                count[op.kind][d] += 1
                done.add(op)
        rows.append((tuple(row),))
    return Schedule("ZB-H1", p, m, 1, tuple(rows))


def _first_ready(
    order: str,
    d: int,
    count: Mapping[str, Sequence[int]],
    done: set[Op],
    p: int,
    m: int,
) -> Op | None:
    for kind in order:
        op = Op(kind, d, count[kind][d])
        if op.microbatch < m and all(
            any(n in done for n in need) for need in needs(op, p)
        ):
            return op
    return None


def _positive(devices: int, microbatches: int, chunks: int) -> None:
    if min(devices, microbatches, chunks) < 1:
        raise ValueError(
            "a pipeline has 1 device, 1 microbatch and 1 stage on each device or more, "
            f"got {devices}, {microbatches} and {chunks}."
        )


def _spell(op: Op) -> str:
    return f"{op.kind} of stage {op.stage} on microbatch {op.microbatch}"


def _cell(op: Op | None, schedule: Schedule) -> str:
    if op is None:
        return "."
    chunk = "abcdefghijklmnopqrstuvwxyz"[op.stage // schedule.devices % 26]
    return f"{op.kind}{chunk if schedule.chunks > 1 else ''}{op.microbatch}"
