import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxeff.training import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, and `now["t"]` reads."""
    now = {"t": 0.0}
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now["t"]))
    return now


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_rates_count_from_the_first_step_and_leave_out_pauses(clock):
    with Progress(100, console=console(False)) as shown:
        clock["t"] = 60.0  # compilation
        shown.update(1, 1.0, 8)
        clock["t"] += 10
        with shown.pause():
            clock["t"] += 1000
        shown.update(21, 1.0, 8)
    assert shown.steps_per_second == 2.0
    assert shown.examples_per_second == 16.0


def test_a_log_gets_plain_lines_now_and_then_and_the_last(clock):
    to = console(False)
    with Progress(100, console=to) as shown:
        for n in range(1, 101):
            shown.update(n, 0.25, 8)
            clock["t"] += 0.125
    lines = to.file.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 0.25"
    assert lines[1] == (
        "step 41/100  loss 0.25  8 steps/s  64 examples/s  0:00:07 left"
    )
    assert lines[-1].startswith("step 100/100") and len(lines) == 4


def test_a_terminal_gets_a_bar_with_rate_and_time_left(clock):
    to = console(True)
    with Progress(100, start_step=10, console=to) as shown:
        shown.update(11, 0.5, 8)
        clock["t"] = 10.0
        shown.update(31, 0.25, 8)
    said = to.file.getvalue()
    assert "31/100" in said and "\x1b[" in said
    assert "loss 0.25  2 steps/s  16 examples/s  0:00:34 left" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_that_is_off_is_silent(clock, terminal):
    to = console(terminal)
    with Progress(2, enabled=False, console=to) as shown:
        shown.update(1, 0.5, 8)
        shown.say("hello")
    assert to.file.getvalue() == ""
