"""The launcher, as a program: what becomes of its processes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGTERM

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLEEPER = """
import os, sys, time
open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
time.sleep(100)
"""


def test_a_launcher_that_is_told_to_end_ends_its_processes(tmp_path):
    launch = [sys.executable, ROOT / "scripts" / "launch.py", "--processes", "2"]
    launcher = subprocess.Popen(
        [*launch, "--", "-c", SLEEPER, tmp_path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    until = time.monotonic() + 60
    while len(pids := os.listdir(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    launcher.terminate()
    # Its output ends only where no process has it any more.
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + SIGTERM
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
