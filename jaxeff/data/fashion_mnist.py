"""Fashion-MNIST from its four idx files: 28 × 28 grey images of clothes.

The idx format is big-endian: a magic number, the size of each dim, the bytes.

Source: Xiao et al. 2017, arXiv:1708.07747,
https://github.com/zalandoresearch/fashion-mnist, licence MIT.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .dataset import Dataset, normalise
from .files import check_folder, find, read

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the 60,000 training images.
MEAN = (0.2860,)
STD = (0.3530,)
SPLITS = {"train": "train", "test": "t10k"}


def fashion_mnist(
    folder: str | Path,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[Dataset, Dataset]:
    """The training split and the test split, 28 × 28 × 1.

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, plain, .gz or .xz.
        mean, std: of pixels in [0, 1].

    Raises:
        ValueError: a file is missing, truncated, corrupt or of another kind.
    """
    folder = check_folder(folder, expects="the four Fashion-MNIST idx files")
    return _split(folder, "train", mean, std), _split(folder, "test", mean, std)


def _split(
    folder: Path, split: str, mean: Sequence[float], std: Sequence[float]
) -> Dataset:
    images_path = find(folder, f"{SPLITS[split]}-images-idx3-ubyte")
    labels_path = find(folder, f"{SPLITS[split]}-labels-idx1-ubyte")
    images = read_idx(images_path, dims=3)
    labels = read_idx(labels_path, dims=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"Fashion-MNIST images are 28 x 28 pixels, but those of {images_path} are "
            f"{' x '.join(map(str, images.shape[1:]))}. Fetch that file again."
        )
    if len(images) != len(labels):
        raise ValueError(
            f"every image has one label, but {images_path} holds {len(images)} images "
            f"and {labels_path} {len(labels)} labels. Fetch both again."
        )
    if labels.max() >= len(CLASSES):
        raise ValueError(
            f"labels of Fashion-MNIST are 0 to 9, but {labels_path} holds "
            f"{labels.max()}. It is corrupt or another data set's: fetch it again."
        )
    return normalise(
        images[..., None],
        labels,
        name=f"fashion_mnist/{split}",
        classes=CLASSES,
        mean=mean,
        std=std,
    )


def read_idx(path: Path, *, dims: int) -> UInt8[np.ndarray, "..."]:
    """The array of unsigned bytes in an idx file.

    Args:
        path: the file, plain, .gz or .xz.
        dims: how many dims the array must have.

    Raises:
        ValueError: another magic number, fewer or more bytes than the header
            says, or no entries at all.
    """
    data = read(path)
    magic = 0x0800 + dims  # 08: unsigned bytes
    header = 4 * (1 + dims)
    found = int.from_bytes(data[:4], "big")
    if len(data) < header or found != magic:
        raise ValueError(
            f"an idx file of {dims} dims starts with the magic number {magic} and "
            f"{dims} sizes, but {path} has {len(data)} bytes and starts with {found}. "
            "It is truncated or another file: fetch it again."
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", dims, offset=4))
    wanted = header + int(np.prod(shape, dtype=np.int64))
    if min(shape) < 1 or len(data) != wanted:
        raise ValueError(
            f"the header of {path} promises {' x '.join(map(str, shape))} bytes after "
            f"its own {header}, so {wanted} in all and at least one, but there are "
            f"{len(data)}. It is truncated or corrupt: fetch it again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
