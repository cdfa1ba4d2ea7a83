import numpy as np
import pytest

from jaxeff.data import digits


def test_the_split_is_four_to_one_in_each_class_to_within_one_image():
    train, test = digits()
    assert (len(train), len(test)) == (1437, 360)
    in_train, in_test = np.bincount(train.labels), np.bincount(test.labels)
    assert np.all(np.abs(in_test - (in_train + in_test) / 5) <= 1)


def test_the_copy_in_the_package_is_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    train, test = digits(mean=(0.0,), std=(1.0,))
    rows = np.argsort(original.target, kind="stable")[::5]
    rest = np.setdiff1d(np.arange(1797), rows)
    for split, where in ((test, np.sort(rows)), (train, rest)):
        assert np.array_equal(split.images[..., 0] * 16, original.images[where])
        assert np.array_equal(split.labels, original.target[where])


def test_no_test_image_is_a_training_image():
    train, test = digits()
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in test.images)
