import pytest
from hypothesis import given, strategies as st

from jaxeff.cost import Chip, chip, CHIPS, mfu, transformer_training_flops


@pytest.mark.parametrize(
    "kind, name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM", 312),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989),
        ("NVIDIA H200", "H200 SXM", 989),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA L4", "L4", 121),
        ("AMD Instinct MI300X", "MI300X", 1300),
        ("TPU v4", "TPU v4", 275),
        ("TPU v5 lite", "TPU v5e", 197),
        ("TPU v5", "TPU v5p", 459),
        ("TPU v6 lite", "TPU v6e", 918),
        ("TPU7x", "TPU v7", 2307 / 2),  # two JAX devices on a chip
    ],
)
def test_the_name_jax_gives_finds_the_chip_and_its_dense_peak(kind, name, tflops):
    found = chip(kind)
    assert found.name == name
    assert found.peak == pytest.approx(tflops * 1e12)


def test_every_chip_of_the_table_is_found_by_its_own_words():
    for known in CHIPS:
        assert chip(" ".join(known.words)).name == known.name


def test_an_unknown_chip_is_refused_with_its_near_misses():
    with pytest.raises(ValueError, match="H100"):
        chip("NVIDIA H1000")


def test_a_slice_of_a_gpu_has_no_peak_of_its_own():
    with pytest.raises(ValueError, match="slice"):
        chip("NVIDIA H100 80GB HBM3 MIG 1g.10gb")


def test_a_chip_without_bfloat16_has_no_such_peak():
    with pytest.raises(ValueError, match="bfloat16"):
        _ = chip("Tesla T4").peak


@given(
    fraction=st.floats(0.01, 1.0),
    seconds=st.floats(1e-3, 10),
    devices=st.integers(1, 1024),
)
def test_mfu_is_the_share_of_the_peak_of_all_devices(fraction, seconds, devices):
    toy = Chip("toy", 1e12, None, ("toy",))
    flops = fraction * 1e12 * seconds * devices
    found = mfu(flops, seconds, toy, convention="6ND", devices=devices)
    assert float(found) == pytest.approx(fraction)


def test_mfu_prints_its_convention_and_its_peak():
    text = str(mfu(989e12 * 0.4, 1.0, chip("NVIDIA H100"), convention="6ND, no more"))
    assert "40.0 %" in text and "6ND, no more" in text
    assert "989" in text and "H100" in text
    assert "5 TFLOP/s, as given" in str(mfu(1e12, 1.0, 5e12, convention="6ND"))


@pytest.mark.parametrize(
    "change", [{"convention": " "}, {"seconds": 0.0}, {"devices": 0}]
)
def test_an_mfu_that_means_nothing_is_refused(change):
    arguments = {"seconds": 1.0, "convention": "6ND", "devices": 1} | change
    seconds = arguments.pop("seconds")
    with pytest.raises(ValueError):
        mfu(1e12, seconds, 1e12, **arguments)


def test_causal_attention_counts_half_and_the_convention_says_so():
    options = {"layers": 3, "heads": 4, "head_dim": 16, "sequence": 128}
    full, full_name = transformer_training_flops(1000, 256, causal=False, **options)
    half, half_name = transformer_training_flops(1000, 256, causal=True, **options)
    base = 6 * 1000 * 256
    assert half - base == (full - base) / 2 == 256 * 12 * 3 * 4 * 16 * 128 / 2
    assert "full" in full_name and "half" in half_name
