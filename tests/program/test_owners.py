"""Which weight an array is stored for."""

import pytest

from jaxeff.program import owners

WEIGHTS = [
    "params/Conv_0/kernel",
    "params/BatchNorm_0/scale",
    "params/Block_0/Conv_0/kernel",
    "params/Block_0/BatchNorm_0/scale",
    "batch_stats/BatchNorm_0/mean",
    "batch_stats/Block_0/BatchNorm_0/mean",
]


@pytest.mark.parametrize("part", ["", "params/", "batch_stats/"])
@pytest.mark.parametrize("before", ["", "0/mu/", "1/0/inner/nu/"])
@pytest.mark.parametrize("behind", ["", "/value"])
def test_the_state_of_any_part_of_the_weights_is_told_apart(part, before, behind):
    of = {
        before + w.removeprefix(part) + behind: [w]
        for w in WEIGHTS
        if w.startswith(part)
    }
    assert owners(of, WEIGHTS) == of


def test_several_trees_in_one_are_read_one_by_one():
    of = {f"params/{w.removeprefix('params/')}": [w] for w in WEIGHTS[:4]}
    of |= {f"opt/0/mu/{w.removeprefix('params/')}": [w] for w in WEIGHTS[:4]}
    of |= {f"ema/{w}": [w] for w in WEIGHTS}
    of |= {"step/other": [], "loss": []}
    assert owners(of, WEIGHTS) == of


def test_what_could_be_of_several_names_them():
    # Of the block, or of some weights outside of it: the paths do not say.
    found = owners(["0/Conv_0/kernel", "0/BatchNorm_0/scale"], WEIGHTS)
    assert found["0/Conv_0/kernel"] == [WEIGHTS[2], WEIGHTS[0]]
    # With the whole path they do, though the block has all of the same names.
    of = {f"0/{w}": [w] for w in WEIGHTS[:2]}
    assert owners(of, WEIGHTS) == of
    two = ["a/x/w", "a/x/b", "c/x/w", "c/x/b"]
    assert owners(["0/x/w"], two) == {"0/x/w": ["a/x/w", "c/x/w"]}
    first = lambda name, weight: weight.startswith("a")
    assert owners(["0/x/w"], two, first) == {"0/x/w": ["a/x/w"]}
    # Of the whole path nothing has to be asked.
    assert owners(["0/a/x/w"], two, lambda *_: False) == {"0/a/x/w": ["a/x/w"]}
