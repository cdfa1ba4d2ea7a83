import gzip

import numpy as np
import pytest

from jaxeff.data import fashion_mnist


def idx(array):
    head = (0x0800 + array.ndim).to_bytes(4, "big")
    return head + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """The four files with 6 training and 4 test images, half of them compressed."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = np.arange(n, dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        zipped = gzip.compress(idx(labels))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(zipped)
    return tmp_path


def test_pixels_and_labels_are_those_of_the_files(folder):
    train, test = fashion_mnist(folder, mean=(0.0,), std=(1.0,))
    raw = (folder / "train-images-idx3-ubyte").read_bytes()[16:]
    assert np.round(train.images * 255).astype(np.uint8).tobytes() == raw
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert test.images.shape == (4, 28, 28, 1)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a data folder must exist.*missing"):
        fashion_mnist(tmp_path / "nowhere")


def test_a_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="must hold t10k-labels-idx1-ubyte"):
        fashion_mnist(folder)


@pytest.mark.parametrize("cut", [3, 10, 4000])
def test_a_truncated_file_is_an_error(folder, cut):
    path = folder / "train-images-idx3-ubyte"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut] if cut == 10 else data[:cut])
    with pytest.raises(ValueError, match=r"train-images.*truncated"):
        fashion_mnist(folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "not gzip"])
def test_a_damaged_gzip_file_is_an_error(folder, damage):
    path = folder / "train-labels-idx1-ubyte.gz"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-6] ^= 0xFF  # the stored checksum
    broken = {"cut": data[:-9], "flip": data, "not gzip": b"plain text"}[damage]
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError, match=r"must be a readable gzip file.*fetch it"):
        fashion_mnist(folder)


def test_labels_in_the_place_of_images_are_an_error(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(idx(np.zeros(6, np.uint8)))
    with pytest.raises(ValueError, match="magic number 2051"):
        fashion_mnist(folder)


def test_images_of_another_size_are_an_error(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(idx(np.zeros((6, 8, 8), np.uint8)))
    with pytest.raises(ValueError, match=r"28 x 28 pixels, but .* are 8 x 8"):
        fashion_mnist(folder)


def test_an_image_without_a_label_is_an_error(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(idx(np.zeros((7, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match="holds 7 images and .* 6 labels"):
        fashion_mnist(folder)


def test_a_label_out_of_range_is_an_error(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(6, 10, np.uint8))))
    with pytest.raises(ValueError, match=r"0 to 9, but .* holds 10"):
        fashion_mnist(folder)


def test_the_real_files_have_mean_0_and_std_1(data_dir):
    train, test = fashion_mnist(data_dir("fashion_mnist"))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert abs(train.images.mean()) < 1e-3 and abs(train.images.std() - 1) < 1e-3
    assert np.all(np.bincount(test.labels) == 1000)
