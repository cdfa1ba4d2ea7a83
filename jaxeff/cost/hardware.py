"""What chips can do at most, and how much of it a step used (MFU).

Peaks are dense bfloat16 with float32 accumulation, never the vendors' figures
with sparsity. MFU is meaningless without the convention that counted the FLOPs
and the peak that divides them, so `Mfu` carries both and prints both.

Sources: peaks as in torchtitan's table (A100, H100, H200, B200, GB200, MI300X,
MI355X, TPU) and the vendors' data sheets; TDP from the vendors' data sheets;
TPU v4 from Jouppi et al. 2023, arXiv:2304.01433 (the highest power measured).
"""

import dataclasses
import difflib
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as it is sold."""

    name: str
    bf16_flops: float | None  # dense, per second; None: it has no bfloat16 units
    watts: float | None  # TDP of the whole board; None: not published
    words: tuple[str, ...]  # all of them stand in the name that JAX gives
    devices: int = 1  # JAX devices per chip

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of one JAX device."""
        if self.bf16_flops is None:
            raise ValueError(
                f"{self.name} has no bfloat16 units, so there is no bfloat16 peak. "
                "Give the peak of the dtype you ran in, in FLOP/s."
            )
        return self.bf16_flops / self.devices


# The more specific names come first: the first whose words all occur is taken.
CHIPS = (
    Chip("A100 PCIe", 312e12, 300.0, ("a100", "pcie")),
    Chip("A100 SXM", 312e12, 400.0, ("a100",)),
    Chip("H100 PCIe", 756e12, 350.0, ("h100", "pcie")),
    Chip("H100 NVL", 835e12, 400.0, ("h100", "nvl")),
    Chip("H100 SXM", 989e12, 700.0, ("h100",)),
    Chip("H200 NVL", 836e12, 600.0, ("h200", "nvl")),
    Chip("H200 SXM", 989e12, 700.0, ("h200",)),
    Chip("B200", 2250e12, 1000.0, ("b200",)),
    Chip("GB200", 2500e12, 1200.0, ("gb200",)),
    Chip("L4", 121e12, 72.0, ("l4",)),
    Chip("L40S", 362e12, 350.0, ("l40s",)),
    Chip("T4", None, 70.0, ("t4",)),
    Chip("V100 SXM2", None, 300.0, ("v100", "sxm2")),
    Chip("RTX 3090", 71e12, 350.0, ("rtx", "3090")),
    Chip("RTX 4090", 165e12, 450.0, ("rtx", "4090")),
    Chip("MI300X", 1300e12, 750.0, ("mi300x",)),
    Chip("MI355X", 2500e12, 1400.0, ("mi355x",)),
    Chip("TPU v4", 275e12, 192.0, ("tpu", "v4")),
    Chip("TPU v5e", 197e12, None, ("tpu", "v5", "lite")),
    Chip("TPU v5e", 197e12, None, ("tpu", "v5e")),
    Chip("TPU v5p", 459e12, None, ("tpu", "v5p")),
    Chip("TPU v5p", 459e12, None, ("tpu", "v5")),
    Chip("TPU v6e", 918e12, None, ("tpu", "v6", "lite")),
    Chip("TPU v6e", 918e12, None, ("tpu", "v6e")),
    Chip("TPU v7", 2307e12, None, ("tpu", "v7"), 2),
    Chip("TPU v7", 2307e12, None, ("tpu7x",), 2),
)


def chip(device_kind: str) -> Chip:
    """The chip behind a name such as `jax.devices()[0].device_kind`.

    Raises:
        ValueError: not in the table (the nearest names are listed), or a slice of
            a chip (MIG), whose peak is not the chip's.
    """
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    if "mig" in words:
        raise ValueError(
            f"{device_kind!r} is a slice of a GPU, whose peak and power are not the "
            "whole chip's. Give peak (FLOP/s) and watts yourself."
        )
    for candidate in CHIPS:
        if words.issuperset(candidate.words):
            return candidate
    names = {c.name.lower(): c.name for c in CHIPS}
    near = difflib.get_close_matches(device_kind.lower(), names, n=5, cutoff=0.0)
    raise ValueError(
        f"no peak or power is known for {device_kind!r}. Nearest of {len(names)} known "
        f"chips: {', '.join(names[n] for n in near)}. "
        "Or give peak (FLOP/s) and watts yourself."
    )


def transformer_training_flops(
    matmul_parameters: int,
    tokens: int,
    *,
    layers: int,
    heads: int,
    head_dim: int,
    sequence: int,
    causal: bool,
) -> tuple[float, str]:
    """FLOPs of a forward and backward pass, and the convention that counted them.

    6 per parameter and token, and 12 * layers * heads * head_dim * sequence per
    token for attention scores and their use; half of the latter where `causal`,
    since masked scores need no computing. What is computed twice to save memory
    (rematerialisation) is never counted.

    Args:
        matmul_parameters: weights that multiply; an embedding look-up does not.
        tokens: in the whole batch of one step.
        layers, heads, head_dim: of the transformer.
        sequence: tokens that one token may attend to.
        causal: count only the unmasked half of attention.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    attention = 12 * layers * heads * head_dim * sequence
    half = "causal half of" if causal else "full"
    flops = tokens * (6 * matmul_parameters + (attention / 2 if causal else attention))
    return float(flops), f"6ND + {half} attention, no rematerialisation"


@dataclasses.dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilisation. `str()` gives it with convention and peak."""

    fraction: float  # of the peak
    convention: str
    peak: float  # FLOP/s of one device
    devices: int
    chip: str

    def __float__(self) -> float:
        return self.fraction

    def __str__(self) -> str:
        return (
            f"MFU {100 * self.fraction:.1f} % (convention: {self.convention}; peak: "
            f"{self.devices} x {self.peak / 1e12:g} TFLOP/s, {self.chip})"
        )


def mfu(
    flops_per_step: float | int,
    seconds: float | int,
    peak: Chip | float | int,
    *,
    convention: str,
    devices: int = 1,
) -> Mfu:
    """Share of the peak that a step's necessary FLOPs reached.

    Args:
        flops_per_step: of the whole step, over all devices.
        seconds: of one step.
        peak: a chip of the table, or FLOP/s of one device.
        convention: how the FLOPs were counted, in words: half or full attention,
            with or without embeddings.
        devices: how many JAX devices shared the step.
    """
    if not convention.strip():
        raise ValueError(
            "an MFU needs its convention: say how the FLOPs were counted, such as "
            "'6ND + full attention, no rematerialisation'."
        )
    if seconds <= 0 or devices < 1:
        raise ValueError(
            f"seconds must be > 0 and devices >= 1, got {seconds} and {devices}."
        )
    per_device = peak.peak if isinstance(peak, Chip) else float(peak)
    name = f"{peak.name} dense bf16" if isinstance(peak, Chip) else "as given"
    fraction = flops_per_step / (seconds * per_device * devices)
    return Mfu(fraction, convention, per_device, devices, name)
