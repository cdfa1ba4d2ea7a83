import gzip
from itertools import islice

import numpy as np
import pytest

from jaxeff.data import text, windows

BOOK = bytes(range(256)) * 4


@pytest.mark.parametrize("packed", [False, True])
def test_the_two_parts_together_are_the_file(tmp_path, packed):
    path = tmp_path / ("book.gz" if packed else "book")
    path.write_bytes(gzip.compress(BOOK) if packed else BOOK)
    train, val = text(path)
    assert train.tobytes() + val.tobytes() == BOOK
    assert len(train) == int(0.9 * len(BOOK))


def test_a_window_is_a_run_of_the_text_and_any_run_can_come_up():
    tokens = np.arange(10, dtype=np.uint8)
    seen = set()
    for batch in windows(tokens, 8, 3, steps=20):
        assert batch.shape == (8, 4) and batch.dtype == np.int32
        assert np.all(np.diff(batch, axis=1) == 1)
        seen.update(batch[:, 0].tolist())
    assert seen == set(range(7))


def test_windows_resume_at_any_step():
    tokens = np.frombuffer(BOOK, np.uint8)
    straight = list(windows(tokens, 4, 9, seed=3, steps=6))
    resumed = list(windows(tokens, 4, 9, seed=3, start_step=4, steps=2))
    assert np.array_equal(straight[4:], resumed)
    assert not np.array_equal(straight[0], straight[1])


def test_the_parts_of_the_processes_make_the_whole_batch():
    tokens = np.frombuffer(BOOK, np.uint8)
    (whole,) = windows(tokens, 6, 9, steps=1)
    parts = [
        next(islice(windows(tokens, 6, 9, process_index=i, process_count=3), 1))
        for i in range(3)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_missing_or_too_short_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="missing. Name the file itself"):
        text(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        text(tmp_path)
    (tmp_path / "short").write_bytes(b"a")
    with pytest.raises(ValueError, match="has 1 bytes, too few to split"):
        text(tmp_path / "short")
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        text(tmp_path / "short", train_fraction=1.0)


@pytest.mark.parametrize("length", [0, 10])
def test_a_window_longer_than_the_text_is_an_error(length):
    tokens = np.arange(10, dtype=np.uint8)
    with pytest.raises(ValueError, match="Choose a length from 1 to 9"):
        windows(tokens, 2, length)


def test_real_text_keeps_its_bytes(data_dir):
    train, val = text(data_dir("tiny_shakespeare") / "input.txt.gz")
    assert len(train) + len(val) == 1_115_394
    assert train[:13].tobytes() == b"First Citizen"
