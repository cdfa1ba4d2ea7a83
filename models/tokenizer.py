"""The tokenizer of llama2.c: byte-pair merges by score, bytes for the rest.

Source: github.com/karpathy/llama2.c, `run.c` (encode, decode) and `tokenizer.py`
(the file); the merges are those of sentencepiece (Kudo & Richardson 2018,
arXiv:1808.06226).
"""

import dataclasses
import functools
import operator
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

BOS, EOS = 1, 2
_FIRST_BYTE = 3  # tokens 3 ... 258 are the 256 bytes, as "<0x00>" ... "<0xFF>"
_FIRST_PIECE = _FIRST_BYTE + 256


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back.

    Law: `decode(encode(text)) == text`, for every text.

    Attributes:
        pieces: the bytes of each token.
        scores: of each token; the pair whose union scores highest merges first.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a llama2.c tokenizer file, such as tok512.bin.

        The format: int32 length of the longest token, then for each token float32
        score, int32 length, the bytes; little-endian.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is cut short, or not of this format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No tokenizer file {path}. Check the path.")
        data = path.read_bytes()
        pieces, scores = [], []
        try:
            (longest,) = struct.unpack_from("<i", data)
            at = 4
            while at < len(data):
                score, length = struct.unpack_from("<fi", data, at)
                at += 8 + length
                if not 0 <= length <= longest or at > len(data):
                    raise ValueError
                pieces.append(data[at - length : at])
                scores.append(score)
            if pieces[_FIRST_BYTE] != b"<0x00>" or len(pieces) < _FIRST_PIECE:
                raise ValueError
        except (struct.error, ValueError, IndexError):
            raise ValueError(
                f"A llama2.c tokenizer is whole records of score, length and bytes, "
                f"256 of them single bytes; {path} of {len(data)} bytes breaks off or "
                f"differs after {len(pieces)} records. Fetch the file again."
            ) from None
        return cls(tuple(pieces), tuple(scores))

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        # Control tokens and bytes are not text: "<0x0A>" typed out is six letters.
        # Where a piece occurs twice, the first one counts.
        ids: dict[bytes, int] = {}
        for i in range(_FIRST_PIECE, len(self.pieces)):
            ids.setdefault(self.pieces[i], i)
        return ids

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Tokens of `text`, by default after BOS.

        Takes time quadratic in the length: made for prompts, not for a corpus.
        """
        # A word's piece includes the space before it; so the first gets one too.
        tokens = []
        for char in " " + text if text else "":
            piece = char.encode()
            if piece in self._ids:
                tokens.append(self._ids[piece])
            else:
                tokens.extend(_FIRST_BYTE + byte for byte in piece)
        while True:
            merges = [
                (self.scores[merged], -i, merged)
                for i in range(len(tokens) - 1)
                if (merged := self._merge(tokens[i], tokens[i + 1])) is not None
            ]
            if not merges:
                break
            _, i, merged = max(merges)
            tokens[-i : -i + 2] = [merged]
        return [BOS] * bos + tokens + [EOS] * eos

    def _merge(self, left: int, right: int) -> int | None:
        if min(left, right) < _FIRST_PIECE:
            return None
        return self._ids.get(self.pieces[left] + self.pieces[right])

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Text of `tokens`; BOS and EOS give none.

        Bytes that are not UTF-8, from a sequence cut within a character, become
        U+FFFD.
        """
        out = b""
        for token in map(operator.index, tokens):
            if not 0 <= token < len(self.pieces):
                raise ValueError(
                    f"A token is in [0, {len(self.pieces)}), got {token}. Use the "
                    f"tokenizer of the model that made it."
                )
            if _FIRST_BYTE <= token < _FIRST_PIECE:
                out += bytes([token - _FIRST_BYTE])
            elif token >= _FIRST_PIECE:
                out += self.pieces[token]
        return out.removeprefix(b" ").decode(errors="replace")
