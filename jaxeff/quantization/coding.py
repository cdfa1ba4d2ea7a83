"""The codes of a weight, found part by part under codebooks that are given.

Calibration sees a weight as matrices (see `program.calibrate`), codes lie in the
weight's own dims: here one is brought to the other, as `places.py` does for scales.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxeff.program import Part

from . import blocks
from .vector import VectorArray

# (matrix, x^T x, codebooks, which of them each row takes, scale of each row) -> the
# matrix of what the codes pick, and the codes: see `gptq_codes`.
Encode = Callable[
    [Array, Array, Array, Array, Array],
    tuple[Float[Array, "rows cols"], Int[Array, "rows vectors stages"]],
]


class Coding:
    """A weight whose codebooks are known, while its parts get other codes.

    Args:
        path: of the weight.
        learned: the weight with codes that are replaced.
    """

    def __init__(self, path: str, learned: VectorArray):
        self.path = path
        self.learned = learned
        self.codes = learned.plain()

    @staticmethod
    def known(like: VectorArray, books: Mapping[str, Array]) -> VectorArray:
        """A weight without codes yet, from its shape and what `books` gave."""
        codes = jnp.zeros(like.codes.shape, like.codes.dtype)
        return dataclasses.replace(
            like, codes=codes, books=books["books"], scale=books.get("scale")
        )

    def books(self) -> dict[str, Array]:
        """The codebooks and the scales, by name."""
        x = self.learned
        return {"books": x.books, **({} if x.scale is None else {"scale": x.scale})}

    def encode(
        self,
        part: Part,
        w: Float[Array, "groups rows cols"],
        h: Float[Array, "groups cols cols"],
        encode: Encode,
    ) -> tuple[Float[Array, "groups rows cols"], Int[Array, "groups rows vectors s"]]:
        """The weights of a part that codes stand for, and these codes.

        Raises:
            ValueError: not all weights of a vector are in the part.
        """
        columns, _, row = self._find(np.asarray(part.elements))
        at = np.unravel_index(row, self.learned.shape)
        books = self.learned.books
        ndim, lengths = self.learned.ndim, books.shape[: self.learned.ndim]
        pairs = zip(at, lengths, self.learned.shape, strict=True)
        number = np.ravel_multi_index([i * k // n for i, k, n in pairs], lengths)
        # Those of this part alone: usually one, which all its rows share.
        ours, book = np.unique(number, return_inverse=True)
        books = books.reshape(-1, *books.shape[ndim:])[ours]
        scale = jnp.ones(row.shape)
        if self.learned.scale is not None:
            scale = blocks.expand(self.learned.scale, self.learned.shape)
            scale = scale.reshape(-1)[row]
        run = jax.vmap(encode, in_axes=(0, 0, None, 0, 0))
        h = h[:, columns][:, :, columns]
        book = jnp.asarray(book.reshape(row.shape), jnp.int32)
        new, codes = run(w[:, :, columns], h, books, book, scale)
        return new[:, :, np.argsort(columns)], codes

    def put(self, part: Part, codes: Int[Array, "groups rows vectors s"]) -> None:
        """Replaces the codes of a part."""
        _, vectors, _ = self._find(np.asarray(part.elements))
        flat = self.codes.reshape(-1, self.learned.stages)
        flat = flat.at[vectors].set(codes.astype(flat.dtype))
        self.codes = flat.reshape(self.codes.shape)

    def stored(self) -> VectorArray:
        """The weight with the codes found."""
        x = self.learned
        return x.stored(self.codes, x.books, x.scale, x.packed)

    def _find(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where a part lies among the codes.

        Args:
            elements: index in the flattened weight, (groups, rows, columns).

        Returns:
            The order of columns in which those of one vector are neighbours; the
            number of each vector's codes, (groups, rows, vectors); an element of each
            row, (groups, rows).
        """
        shape, dim = list(self.learned.shape), self.learned.dim
        along = self.learned.along + len(shape)
        where = list(np.unravel_index(elements, shape))
        inside, where[along] = where[along] % dim, where[along] // dim
        shape[along] //= dim
        vector = np.ravel_multi_index(where, shape)
        columns = np.lexsort((inside[0, 0], vector[0, 0]))
        cut = lambda x: x[..., columns].reshape(*x.shape[:2], -1, dim)
        fits = elements.shape[-1] % dim == 0
        if fits:
            vector, inside = cut(vector), cut(inside)
            whole = (vector == vector[..., :1]).all()
            fits = whole and (inside == np.arange(dim)).all()
        if not fits:
            raise ValueError(
                f"a code of {self.path} stands for {dim} neighbouring weights, but "
                f"some of them are multiplied apart from the others, so no data tells "
                f"of them together. Take dim=1 for it."
            )
        return columns, vector[..., 0], elements[..., 0]
