"""Ray on one machine, for a run that finds no cluster."""

import logging
import os
import secrets
import subprocess
import sys

# What holds a cluster until its input ends, as it does when the run is gone.
_HEAD = """
import logging, sys, ray
quiet = {"include_dashboard": False, "log_to_driver": False}
found = ray.init(num_cpus=int(sys.argv[1]), logging_level=logging.ERROR, **quiet)
print(found.address_info["address"], flush=True)
sys.stdin.read()
"""


class Cluster:
    """Ray on this machine, started by a process of its own and connected to.

    Ray forks when it starts, and a process in which JAX has threads may then hang.
    """

    def __init__(self, cores: int):
        """With so many CPUs to give away.

        Raises:
            ValueError: it does not start.
        """
        # Nobody else on this machine may join. Ray reads this when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HEAD, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        if not address:
            said = self._process.communicate()[1].strip().splitlines() or ["no reason"]
            raise ValueError(f"Ray does not start on this machine: {said[-1]}.")
        import ray

        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

    def close(self) -> None:
        """Ends it, and all that runs on it."""
        import ray

        ray.shutdown()
        self._process.communicate()


def connected() -> bool:
    """Whether Ray runs already.

    Raises:
        ValueError: it is only imported.
    """
    if "ray" not in sys.modules:
        return False
    running = sys.modules["ray"].is_initialized()
    if not running and "RAY_AUTH_MODE" not in os.environ:
        raise ValueError(
            "Ray was imported, but not started: call ray.init() before the run, or "
            "leave both to it."
        )
    return running
