import gzip
import lzma

import numpy as np
import pytest

from jaxeff.data import cifar10


def records(n, seed):
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (n, 3073)).astype(np.uint8)
    made[:, 0] = rng.integers(0, 10, n)
    return made


@pytest.fixture
def folder(tmp_path):
    """Five training images in three files, each packed another way, two for test."""
    made = records(5, 0)
    (tmp_path / "data_batch_1.bin").write_bytes(made[:2].tobytes())
    (tmp_path / "data_batch_2.bin.gz").write_bytes(gzip.compress(made[2:4].tobytes()))
    (tmp_path / "train_extra.bin.xz").write_bytes(lzma.compress(made[4:].tobytes()))
    (tmp_path / "test_batch.bin").write_bytes(records(2, 1).tobytes())
    (tmp_path / "batches.meta.txt").write_text("not a record")
    return tmp_path


def test_all_files_of_a_split_are_read_in_order_of_name(folder):
    train, test = cifar10(folder, mean=(0.0,) * 3, std=(1.0,) * 3)
    made = records(5, 0)
    planes = np.round(train.images * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    assert np.array_equal(planes.reshape(5, -1), made[:, 1:])
    assert np.array_equal(train.labels, made[:, 0])
    assert len(test) == 2


def test_a_file_beside_its_own_compressed_copy_counts_once(folder):
    data = (folder / "data_batch_1.bin").read_bytes()
    (folder / "data_batch_1.bin.xz").write_bytes(lzma.compress(data))
    assert len(cifar10(folder)[0]) == 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_a_split_is_an_error(folder, split):
    for path in folder.glob("test*" if split == "test" else "*[0-9a].bin*"):
        path.unlink()
    with pytest.raises(ValueError, match=f"must hold the {split} images as"):
        cifar10(folder)


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_a_size_that_is_no_multiple_of_a_record_is_an_error(folder, size):
    (folder / "test_batch.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"3073 bytes each, but .* has {size} bytes"):
        cifar10(folder)


def test_a_label_out_of_range_is_an_error_that_names_the_record(folder):
    made = records(3, 0)
    made[1, 0] = 77
    (folder / "test_batch.bin").write_bytes(made.tobytes())
    with pytest.raises(ValueError, match=r"0 to 9, but record 1 of .* has 77"):
        cifar10(folder)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_xz_file_is_an_error(folder, damage):
    path = folder / "train_extra.bin.xz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data[:-20] if damage == "cut" else data))
    with pytest.raises(ValueError, match="must be a readable xz file"):
        cifar10(folder)


def test_the_real_test_images_are_a_thousand_of_each_class(data_dir, tmp_path):
    real = data_dir("cifar10")
    (tmp_path / "test_batch.bin.xz").symlink_to(real / "test_batch.bin.xz")
    (tmp_path / "train.bin").write_bytes(records(1, 0).tobytes())
    _, test = cifar10(tmp_path)
    assert np.all(np.bincount(test.labels) == 1000)
    # The means are those of all training images, so only nearly those of the test.
    assert np.all(np.abs(test.images.mean((0, 1, 2))) < 0.02)
    assert np.all(np.abs(test.images.std((0, 1, 2)) - 1) < 0.02)
