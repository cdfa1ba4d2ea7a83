"""A labelled set of images in memory, normalised and ready for a model.

The readers (`digits.py`, `fashion_mnist.py`, `cifar10.py`) check the bytes and
hand them to `normalise`; everything above sees only `Dataset`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set.

    Law: `pixels = images * std + mean` are the original pixels, in [0, 1].

    Attributes:
        name: "digits", "fashion_mnist" or "cifar10", and the split: "digits/train".
        images: height × width × channels, normalised per channel.
        labels: indices into `classes`.
        classes: what each label means.
        mean, std: per channel, of pixels in [0, 1]; `images` was made with them.
    """

    name: str
    images: Float[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)


def normalise(
    pixels: UInt8[np.ndarray, "n height width channels"],
    labels: UInt8[np.ndarray, " n"],
    *,
    name: str,
    classes: tuple[str, ...],
    mean: Sequence[float],
    std: Sequence[float],
    largest: int = 255,
) -> Dataset:
    """A `Dataset` of float32 `(pixels / largest - mean) / std` and int32 labels.

    Args:
        pixels: grey levels from 0 to `largest`.
        labels: below `len(classes)`.
        name: of the data set and the split, for messages.
        classes: the name of each label.
        mean, std: one value per channel, in units of `pixels / largest`.
        largest: the grey level that means 1.

    Raises:
        ValueError: not one mean and one positive std per channel.
    """
    channels = pixels.shape[-1]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(
            f"{name} has {channels} channels, so it takes {channels} means and "
            f"{channels} stds above 0, got mean {tuple(mean)} and std {tuple(std)}."
        )
    # One float32 copy, worked on in place: CIFAR-10 is 0.6 GB of them.
    images = pixels.astype(np.float32)
    images /= largest
    images -= np.asarray(mean, np.float32)
    images /= np.asarray(std, np.float32)
    return Dataset(
        name,
        images,
        labels.astype(np.int32),
        classes,
        tuple(float(m) for m in mean),
        tuple(float(s) for s in std),
    )
