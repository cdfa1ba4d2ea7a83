import pytest

from jaxeff.parallelism import gpipe, one_f_one_b, Op, Schedule, zero_bubble
from jaxeff.parallelism.schedules import COSTS

SCHEDULES = [
    *(
        make(p, m)
        for make in (gpipe, one_f_one_b)
        for p in (1, 2, 4)
        for m in (1, 4, 9)
    ),
    *(one_f_one_b(p, m, v) for p, m in ((2, 4), (4, 8), (4, 12)) for v in (2, 3)),
    *(zero_bubble(p, m) for p in (1, 2, 4, 8) for m in (1, 4, 9, 40)),
]
NAMES = [f"{s.name} {s.devices}x{s.chunks} {s.microbatches}" for s in SCHEDULES]
each = pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)


@each
def test_everything_runs_once_and_after_what_it_needs(schedule):
    schedule.check()
    ops = schedule.operations()
    kinds = 3 if schedule.name == "ZB-H1" else 2
    assert len(ops) == len({*ops}) == kinds * schedule.stages * schedule.microbatches


@each
def test_the_idle_part_is_what_was_published(schedule):
    p, m, v = schedule.devices, schedule.microbatches, schedule.chunks
    if schedule.name != "ZB-H1":
        assert schedule.bubble() == pytest.approx((p - 1) / (v * m + p - 1))
    elif m >= p:
        # Of forwards as long as each half of a backward, a third of 1F1B's idle time.
        assert schedule.duration() == 3 * m + p - 1
        assert schedule.bubble() == pytest.approx((p - 1) / (3 * m + p - 1))


def test_what_is_held_grows_with_the_microbatches_in_gpipe_only():
    held = lambda make, p: [max(make(p, m).held()) for m in (8, 64)]
    assert held(gpipe, 4) == [8, 64]
    assert held(one_f_one_b, 4) == [7, 7]  # 2 p - 1
    assert held(zero_bubble, 4) == [4, 4]


def test_a_longer_operation_makes_all_wait():
    s = one_f_one_b(2, 4)
    assert s.duration({**COSTS, "F": 2.0, "B": 2.0}) == 4 * 5
    assert s.bubble({**COSTS, "F": 0.0}) == s.bubble()  # one backward after another


def test_a_schedule_is_drawn_with_a_row_for_each_device():
    text = str(one_f_one_b(2, 2, 2))
    assert "2 devices, 2 stages on each, 2 microbatches" in text
    assert [line[:9] for line in text.splitlines()[1:]] == ["device 0 ", "device 1 "]
    assert "Fb1" in text and "Ba0" in text


@pytest.mark.parametrize("p", range(1, 17))
def test_zero_bubble_is_idle_as_published_from_as_many_microbatches_as_devices(p):
    for m in (p, p + 1, 2 * p + 1, 69):
        assert zero_bubble(p, m).duration() == 3 * m + p - 1


def changed(s, change):
    ops = [[list(lane) for lane in tick] for tick in s.ops]
    change(ops)
    frozen = tuple(tuple(tuple(lane) for lane in tick) for tick in ops)
    return Schedule(s.name, s.devices, s.microbatches, s.chunks, frozen)


def swap(ops):
    ops[0][0][0], ops[1][0][0] = ops[1][0][0], ops[0][0][0]
    ops[1][0][1], ops[2][0][1] = ops[2][0][1], ops[1][0][1]


def early(ops):
    ops[0][0][1] = Op("F", 1, 0)
    ops[1][0][1] = None


def lost(ops):
    ops[-1][1][0] = None


def twice(ops):
    ops[-1][0][0] = Op("F", 0, 1)


def other(ops):
    ops[-1][0][0] = Op("F", 0, 9)


def shorter(ops):
    del ops[-1][1]


def elsewhere(ops):
    ops[0][0][0], ops[0][0][1] = None, ops[0][0][0]


@pytest.mark.parametrize(
    "change, said",
    [
        (early, "tick 0 runs F of stage 1 on microbatch 0, but F of stage 0"),
        (lost, "B of stage 0 on microbatch 2 never runs"),
        (twice, "F of stage 0 on microbatch 1 once more"),
        (other, "F of stage 0 on microbatch 9 is none of this schedule"),
        (shorter, "every tick has as many lanes"),
        (elsewhere, "stage 0 is on device 0, but tick 0 runs .* on device 1"),
    ],
)
def test_a_wrong_table_is_found(change, said):
    with pytest.raises(ValueError, match=said):
        changed(one_f_one_b(2, 3), change).check()


def test_an_empty_table_is_found():
    with pytest.raises(ValueError, match="as many lanes"):
        Schedule("empty", 2, 4, 1, ()).check()
    forward_only = tuple(tick[:1] for tick in gpipe(1, 2).ops)
    with pytest.raises(ValueError, match="B of stage 0 on microbatch 0 never runs"):
        Schedule("no backward", 1, 2, 1, forward_only).check()


def test_microbatches_may_come_in_any_order():
    changed(gpipe(2, 3), swap).check()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: gpipe(0, 4), "got 0, 4 and 1"),
        (lambda: zero_bubble(2, 0), "got 2, 0 and 1"),
        (lambda: one_f_one_b(4, 8, 0), "got 4, 8 and 0"),
        (lambda: one_f_one_b(4, 6, 2), "6 is no multiple of that"),
    ],
)
def test_numbers_that_make_no_pipeline_are_an_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()
