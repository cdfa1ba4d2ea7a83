import numpy as np
import pytest

from jaxeff.data.dataset import normalise

LABELS = np.zeros(5, np.uint8)


def test_normalising_undone_gives_the_pixels_back():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    data = normalise(pixels, LABELS, name="x", classes=("a",), mean=mean, std=std)
    back = data.images * np.array(data.std) + np.array(data.mean)
    assert np.allclose(back * 255, pixels, atol=1e-3)
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32
    assert len(data) == 5


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (1.0, 1.0, 1.0)), ((0.5,) * 3, (1.0, 1.0, 0.0))]
)
def test_one_mean_and_one_positive_std_per_channel_or_an_error(mean, std):
    pixels = np.zeros((5, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="x has 3 channels, so it takes 3 means"):
        normalise(pixels, LABELS, name="x", classes=("a",), mean=mean, std=std)
