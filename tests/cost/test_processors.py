import pytest

from jaxeff.cost import processor
from jaxeff.cost.processors import DEFAULT_WATTS_PER_CORE, PROCESSORS


def cpuinfo(tmp_path, name):
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel\t\t: 1\nmodel name\t: {name}\n\nprocessor\t: 1\n"
    )
    return path


@pytest.mark.parametrize(
    "name, watts, cores",
    [
        ("AMD EPYC 7763 64-Core Processor", 280, 64),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", 145, 18),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 300, 32),
        ("13th Gen Intel(R) Core(TM) i9-13900K", 125, 24),
    ],
)
def test_the_name_linux_gives_finds_the_processor(tmp_path, name, watts, cores):
    found = processor(cpuinfo(tmp_path, name))
    assert (found.watts, found.cores, found.known) == (watts, cores, True)
    assert f"{watts} W / {cores} cores" in str(found)


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) CPU @ 2.20GHz", ""])
def test_an_unknown_processor_says_that_it_is_a_default(tmp_path, name):
    found = processor(cpuinfo(tmp_path, name))
    assert not found.known
    assert found.watts_per_core == DEFAULT_WATTS_PER_CORE
    assert "default" in str(found)


def test_a_machine_without_cpuinfo_gets_the_default(tmp_path):
    assert not processor(tmp_path / "nothing").known


def test_the_default_lies_inside_the_table():
    each = [p.watts_per_core for p in PROCESSORS]
    assert min(each) < DEFAULT_WATTS_PER_CORE < max(each)


def test_every_processor_of_the_table_is_found_by_its_own_name(tmp_path):
    for known in PROCESSORS:
        assert processor(cpuinfo(tmp_path, known.name)) == known
