import gzip
import lzma

import pytest

from jaxeff.data.files import check_folder, find, read


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_packing_changes_nothing_that_is_read(tmp_path, suffix, pack):
    (tmp_path / f"a{suffix}").write_bytes(pack(b"some bytes"))
    assert read(find(tmp_path, "a")) == b"some bytes"


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="is a file. Name the folder that holds b"):
        check_folder(tmp_path / "a", expects="b")
