"""The benchmark of plans for a pod, with a small model on eight chips."""

from dataclasses import replace

import pytest

from jaxeff.models.llama import LLAMA_3_70B
from scripts.bench.pod import Config, GIB, measure, mesh_of, shown

SIZES = {"vocab_size": 1024, "d_model": 512, "hidden": 1024, "n_layers": 4}
SMALL = replace(LLAMA_3_70B, **SIZES, n_heads=8, n_kv_heads=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["fsdp=8", "fsdp=4,tensor=2", "pipe=2,fsdp=2,tensor=2"]
)
def test_each_chip_keeps_its_part_of_weights_and_moments(tpus, plan):
    c = Config(batch_size=16, length=128, microbatches=4)
    row = measure(c, SMALL, plan, tpus("v5e:2x4"))
    # Float32, and Adam's two moments; norms and what is too small stay whole.
    parts = 12 * row["parameters"] / 8 / GIB
    assert parts <= row["state_gib"] < 1.2 * parts
    assert all(sent > 0 for sent in row["sent_gib"].values())


def test_the_best_fits_and_sends_least():
    row = {"state_gib": 10.0, "parameters": 1, "compile_seconds": 1.0}
    rows = [
        row | {"plan": "a", "working_gib": 5.0, "sent_gib": {"fsdp": 9.0}},
        row | {"plan": "b", "working_gib": 5.0, "sent_gib": {"fsdp": 3.0, "pipe": 4.0}},
        row | {"plan": "c", "working_gib": 25.0, "sent_gib": {"fsdp": 1.0}},
    ]
    ends = [line.split()[-1] for line in shown(rows, memory=32.0).splitlines()[2:]]
    assert ends == ["fits", "best", "much"]


def test_a_plan_that_is_none_is_an_error():
    with pytest.raises(ValueError, match=r"as in fsdp=32,tensor=8, got 'fsdp'"):
        mesh_of("fsdp", [])
