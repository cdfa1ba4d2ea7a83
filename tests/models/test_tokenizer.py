import struct

import pytest
from hypothesis import given, strategies as st

from jaxeff.models import BOS, EOS, Tokenizer

PIECES = [
    (b"<unk>", 0.0),
    (b"\n<s>\n", 0.0),
    (b"\n</s>\n", 0.0),
    *((f"<0x{i:02X}>".encode(), 0.0) for i in range(256)),
    *((bytes([c]), -1e6 - i) for i, c in enumerate(b" abcd<0x1>")),
    ("é".encode(), -1e6),
    (b"ab", -3.0),
    (b"bc", -1.0),
    (b"abc", -4.0),
    (b" a", -2.0),
    (b" ab", -5.0),
]


def _file(pieces):
    body = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in pieces)
    return struct.pack("<i", max(len(p) for p, _ in pieces)) + body


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok.bin"
    path.write_bytes(_file(PIECES))
    return Tokenizer.load(path)


def test_a_file_is_read_as_written(tokenizer):
    assert list(zip(tokenizer.pieces, tokenizer.scores, strict=True)) == PIECES


@given(text=st.text() | st.text("abcd <0x1>\né"))
def test_decoding_what_was_encoded_gives_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=True)) == text


def test_the_pair_with_the_highest_score_merges_first(tokenizer):
    def pieces(text):
        return [tokenizer.pieces[i] for i in tokenizer.encode(text, bos=False)]

    # "bc" (-1) before " a" (-2) before "ab" (-3); then " a" and "bc" have no union.
    assert pieces("abc") == [b" a", b"bc"]
    # Of two equal pairs the left one.
    assert pieces("dabab") == [b" ", b"d", b"ab", b"ab"]
    # " a" and "b" unite at last, though " ab" scores lowest.
    assert pieces("ab") == [b" ab"]


def test_what_has_no_piece_becomes_bytes(tokenizer):
    assert tokenizer.encode("日", bos=False)[1:] == [3 + b for b in "日".encode()]


def test_control_tokens_frame_the_text(tokenizer):
    tokens = tokenizer.encode("a", eos=True)
    assert (tokens[0], tokens[-1]) == (BOS, EOS)
    assert tokenizer.encode("") == [BOS]


def test_bytes_cut_within_a_character_become_a_replacement(tokenizer):
    assert tokenizer.decode(tokenizer.encode("日")[:-1]) == "�"


def test_a_token_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=rf"\[0, {len(PIECES)}\), got {len(PIECES)}"):
        tokenizer.decode([len(PIECES)])


WHOLE = _file(PIECES)


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", WHOLE[:4], WHOLE[:1000], WHOLE[:-1], WHOLE + b"\0", b"x" * 5000],
    ids=["empty", "3 bytes", "header", "cut", "cut at end", "a byte more", "foreign"],
)
def test_a_cut_or_foreign_file_is_refused_in_one_line(data, tmp_path):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"of {len(data)} bytes breaks off") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No tokenizer file .*none\.bin"):
        Tokenizer.load(tmp_path / "none.bin")
