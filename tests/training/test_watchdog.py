import subprocess
import sys
import time

import pytest

from jaxeff.training.watchdog import TRY_AGAIN, Watchdog

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_some_steps_may_take_longer[one that is seldom]",
}

PROGRAM = """
import time
from jaxeff.training.watchdog import Watchdog
with Watchdog({seconds}, lambda: "nothing\\n  moves") as watchdog:
    {does}
print("done")
"""


def run(does, seconds=0.5):
    program = PROGRAM.format(does=does, seconds=seconds)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_process_that_is_stuck_ends_with_one_line():
    done = run("watchdog.heard(); time.sleep(60)")
    assert done.returncode == TRY_AGAIN
    assert done.stderr == "error: nothing moves\n" and done.stdout == ""


def test_one_that_goes_on_is_left_alone():
    done = run("[(time.sleep(0.2), watchdog.heard()) for _ in range(6)]")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    "does",
    [
        "time.sleep(1.5)",
        "watchdog.heard()\n    with watchdog.seldom():\n        time.sleep(1.5)",
    ],
    ids=["the first", "one that is seldom"],
)
def test_some_steps_may_take_longer(does):
    assert run(does).returncode == 0


def test_after_its_block_it_watches_no_more():
    with Watchdog(0.1, lambda: "never") as watchdog:
        watchdog.heard()
    time.sleep(0.3)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_out_is_above_zero(seconds):
    with pytest.raises(ValueError, match="above 0 seconds"):
        Watchdog(seconds, lambda: "never")
