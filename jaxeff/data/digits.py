"""1,797 handwritten digits of 8 × 8 pixels, embedded in the package.

Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, doi:10.24432/C50P49, licence CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). These are the 1,797 images of its
test file, in its order, as scikit-learn 1.9.1 distributes them
(`sklearn.datasets.load_digits`): 13 writers, grey levels 0 to 16. Changed only in
the packing: `digits.npz` holds `images` (1797, 8, 8) and `labels` as uint8.
"""

from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from .dataset import Dataset, normalise

CLASSES = tuple("0123456789")
# Of the training split, in units of a full stroke (grey level 16).
MEAN = (0.3058,)
STD = (0.3762,)


def digits(
    *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> tuple[Dataset, Dataset]:
    """The training split (1,437 images) and the test split (360), 8 × 8 × 1.

    Every fifth image, counted class by class, is a test image: each class is
    split 4 : 1 to within one image, in every version of every library.
    """
    with (files("jaxeff.data") / "digits.npz").open("rb") as file, np.load(file) as npz:
        images, labels = npz["images"][..., None], npz["labels"]
    test = np.zeros(len(labels), bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    train, test = (
        normalise(
            images[where],
            labels[where],
            name=f"digits/{split}",
            classes=CLASSES,
            mean=mean,
            std=std,
            largest=16,
        )
        for split, where in (("train", ~test), ("test", test))
    )
    return train, test
