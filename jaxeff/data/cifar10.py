"""CIFAR-10 from its binary records: 32 × 32 colour images of ten things.

A record is 3073 bytes: the label, then the red, green and blue planes, each
row by row.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images",
https://www.cs.toronto.edu/~kriz/cifar.html (the "binary version").
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .dataset import Dataset, normalise
from .files import check_folder, read, SUFFIXES

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Of the 50,000 training images.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
RECORD = 1 + 3 * 32 * 32  # bytes
SPLITS = {"train": ("train", "data_batch"), "test": ("test",)}


def cifar10(
    folder: str | Path,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[Dataset, Dataset]:
    """The training split and the test split, 32 × 32 × 3, in order of file name.

    Args:
        folder: the training images are all its `train*.bin` and `data_batch*.bin`,
            however many there are, the test images its `test*.bin`; each plain,
            .gz or .xz.
        mean, std: of pixels in [0, 1], for red, green and blue. A model trained
            elsewhere needs those it was trained with.

    Raises:
        ValueError: a file is missing, truncated, corrupt or of another kind.
    """
    folder = check_folder(folder, expects="the CIFAR-10 binary records")
    return _split(folder, "train", mean, std), _split(folder, "test", mean, std)


def _split(
    folder: Path, split: str, mean: Sequence[float], std: Sequence[float]
) -> Dataset:
    records = np.concatenate([_records(path) for path in _files(folder, split)])
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return normalise(
        planes.transpose(0, 2, 3, 1),
        records[:, 0],
        name=f"cifar10/{split}",
        classes=CLASSES,
        mean=mean,
        std=std,
    )


def _files(folder: Path, split: str) -> list[Path]:
    chosen: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for prefix in SPLITS[split]:
            for path in folder.glob(f"{prefix}*.bin{suffix}"):
                # A file beside its own compressed copy counts once.
                chosen.setdefault(path.name.removesuffix(suffix), path)
    if not chosen:
        names = " or ".join(f"{prefix}*.bin" for prefix in SPLITS[split])
        raise ValueError(
            f"{folder} must hold the {split} images as {names} (plain, .gz or .xz), "
            "but it has no such file. Unpack the binary version of CIFAR-10 there, or "
            "name another folder."
        )
    return [chosen[name] for name in sorted(chosen)]


def _records(path: Path) -> UInt8[np.ndarray, "n 3073"]:
    data = read(path)
    if not data or len(data) % RECORD:
        raise ValueError(
            f"CIFAR-10 records are {RECORD} bytes each, but {path} has {len(data)} "
            f"bytes, {len(data) % RECORD} more than a multiple of that. It is "
            "truncated or another file: fetch it again."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    worst = int(records[:, 0].argmax())
    if records[worst, 0] >= len(CLASSES):
        raise ValueError(
            f"labels of CIFAR-10 are 0 to 9, but record {worst} of {path} has "
            f"{records[worst, 0]}. It is corrupt or another data set's: fetch it again."
        )
    return records
