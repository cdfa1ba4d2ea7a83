"""A data set by its name, as the command line gives it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from .cifar10 import cifar10
from .dataset import Dataset
from .digits import digits
from .fashion_mnist import fashion_mnist

IN_FOLDERS: dict[str, Callable[..., tuple[Dataset, Dataset]]] = {
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Dataset, Dataset]:
    """The training and the test split of "digits", "fashion_mnist" or "cifar10".

    Args:
        name: of the data set.
        folder: where its files are; digits are part of the package and take none.
        mean, std: per channel, of pixels in [0, 1]; the data set's own by default.

    Raises:
        ValueError: an unknown name, no folder, or bad files in it.
    """
    options = {k: v for k, v in (("mean", mean), ("std", std)) if v is not None}
    if name == "digits":
        return digits(**options)
    if name not in IN_FOLDERS:
        known = ", ".join(["digits", *IN_FOLDERS])
        raise ValueError(f"there is no data set {name!r}. Choose one of: {known}.")
    if folder is None:
        raise ValueError(
            f"{name} is not part of the package: name the folder that holds its files."
        )
    return IN_FOLDERS[name](folder, **options)
