import pytest

from jaxeff.parallelism import gpipe, one_f_one_b, zero_bubble
from jaxeff.parallelism.tables import KINDS, make_table
from tests.parallelism.test_schedules import each


@each
def test_what_a_device_reads_is_what_was_put_there_for_it(schedule):
    """Walks through the table with tokens in place of arrays."""
    s, table = schedule, make_table(schedule)
    last, p = s.stages - 1, s.devices
    rooms = {name: [{} for _ in range(p)] for name in table.places._fields}
    ran = 0
    for t in range(s.ticks):
        for lane in range(len(s.ops[0])):
            came = []
            for d in range(p):
                row = type(table.rows)(*(int(a[t, lane, d]) for a in table.rows))
                if row.kind:
                    kind = KINDS[row.kind - 1]
                    k, n = row.chunk * p + d, row.microbatch
                    ran += 1
                    if kind == "F":
                        if k > 0:
                            assert rooms["input"][d][row.input] == (k, n)
                        rooms["kept"][d][row.kept] = (k, n)
                        if k == last:
                            came.append(("cotangent", d, row.own, (k, n)))
                        else:
                            came.append(("sent", "input", (d + 1) % p, (k + 1, n)))
                    if kind in "BI":
                        assert rooms["cotangent"][d][row.cotangent] == (k, n)
                        if k > 0:
                            came.append(("sent", "cotangent", (d - 1) % p, (k - 1, n)))
                    if kind in "BIW":
                        assert rooms["kept"][d][row.kept] == (k, n)
                    if kind == "I":
                        rooms["handed"][d][row.handed] = (k, n)
                    if kind == "W":
                        assert rooms["handed"][d][row.handed] == (k, n)
            what = table.lanes[t][lane]
            for name, at, place, key in came:
                if name == "sent":
                    of = table.rows.came_input if at == "input" else None
                    of = table.rows.came_cotangent if of is None else of
                    assert getattr(what, f"sends_{at}s")
                    rooms[at][place][int(of[t, lane, place])] = key
                else:
                    rooms[name][at][place] = key
    assert ran == len(s.operations())
    for name, count in table.places._asdict().items():
        assert all(0 <= place < count for room in rooms[name] for place in room)


def test_places_do_not_grow_with_the_microbatches():
    places = lambda make: [make_table(make(4, m)).places for m in (8, 64)]
    one, other = places(one_f_one_b)
    assert one == other and one.kept == 7
    one, other = places(zero_bubble)
    assert one == other and one.kept == 4
    assert [p.kept for p in places(gpipe)] == [8, 64]


@pytest.mark.parametrize("m", [4, 32])
def test_alike_ticks_are_run_by_one_loop(m):
    runs = list(make_table(one_f_one_b(4, m)).segments())
    assert len(runs) == 5  # some send no more, or not yet
    assert [(begin, end) for begin, end, _ in runs][0][0] == 0
    assert runs[-1][1] == m + 2 * 4 - 2
    (only,) = make_table(zero_bubble(4, m)).segments()
    assert only[2][0].kinds == "FIW"


def test_activations_go_on_as_long_as_some_stage_has_one_to_hand_on():
    p, m = 4, 16
    table = make_table(one_f_one_b(p, m))
    assert table.sent == table.needed == 2 * (m + p - 2)
    # Where no two ticks are alike all are run as one, and send in each.
    merged = make_table(zero_bubble(p, m))
    assert merged.needed < merged.sent == 2 * zero_bubble(p, m).ticks
