"""What every test shares: 8 virtual devices, strict shapes, keys and real data."""

import os
import zlib
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

# Before any backend starts. Sharding can then be tested on any machine.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a busy machine devices may wait for each other longer than the 40 s after which XLA
# ends the process. Programs that tests start inherit it.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE}"

# The first call of every example compiles, so a deadline would only measure XLA.
hypothesis.settings.register_profile(
    "ci", max_examples=20, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
hypothesis.settings.load_profile(PROFILE)


def pytest_configure(config):
    # Eight devices exist on the CPU only; a GPU is for the tests that ask for it.
    if "JAX_PLATFORMS" not in os.environ and config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what a module names in `SLOW`, single cases of a test among it."""
    for item in items:
        if item.name in getattr(item.module, "SLOW", ()):
            item.add_marker("slow")


def pytest_report_header():
    return f"jax {jax.__version__}, hypothesis profile {PROFILE}"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU, and `pytest -m gpu` to see it")


@pytest.fixture
def getkey(request):
    """`getkey()` is a fresh random key at each call, the same in every run."""
    key = jr.key(zlib.crc32(request.node.nodeid.encode()))

    def getkey():
        nonlocal key
        key, new = jr.split(key)
        return new

    return getkey


@pytest.fixture(autouse=True)
def same_numbers(request):
    """The numbers that a module's `RNG` draws don't hang on which tests ran before."""
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir():
    """`data_dir(name)` is the folder of a real data set; without it the test skips."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("JAXEFF_DATA", beside))

    def data_dir(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            pytest.skip(f"no real data in {folder}; JAXEFF_DATA names another folder")
        return folder

    return data_dir


@pytest.fixture(scope="session")
def tpus():
    """`tpus("v5e:2x4")` are the devices of TPUs that are not there, to compile for."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: jaxeff[tpu]")
    from jaxeff.parallelism import tpu_devices

    return tpu_devices


@pytest.fixture
def normal(request):
    """`normal(*shape)` is a fresh standard normal float32 array at each call.

    By NumPy: a draw by JAX compiles a program for every shape.
    """
    rng = np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return normal
