"""Codebooks as a format: a code for one weight or several neighbours.

Each code picks one of 2**bits vectors of `dim` weights, which are learned from the
weights (`learn.py`); with several stages the vectors they pick add up. `VectorArray`
in `vector.py` holds the result.

Sources: Gong et al. 2014, arXiv:1412.6115 (k-means, product and residual codebooks);
Han et al. 2015, arXiv:1510.00149, section 3 (weights that share values).
"""

import dataclasses
from collections.abc import Sequence

from .formats import fill_blocks


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A format: codes into codebooks that are learned from the weight.

    Attributes:
        bits: of a code, 1 to 8.
        dim: how many weights one code stands for: neighbours along the last of the
            dims that are summed.
        stages: codes for each vector, whose vectors add up; learned one after the
            other, then all together.
        outputs: how many neighbouring outputs share codebooks; None: all.
        scaled: whether each output has a float32 scale, so that codebooks hold the
            shape of its weights and not their size.
        steps: of k-means.
    """

    bits: int
    _: dataclasses.KW_ONLY
    dim: int = 1
    stages: int = 1
    outputs: int | None = None
    scaled: bool = True
    steps: int = 30

    activations = None  # they stay as they are
    range = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8 or min(self.dim, self.stages, self.steps) < 1:
            raise ValueError(
                f"codes have 1 to 8 bits, for 1 weight or more in 1 stage or more, got "
                f"bits={self.bits}, dim={self.dim}, stages={self.stages}, "
                f"steps={self.steps}."
            )

    @property
    def group(self) -> int | None:
        """Weights that are coded together; None: each alone."""
        return self.dim if self.dim > 1 else None

    @property
    def name(self) -> str:
        """`codebook4`, `codebook8x4`: bits and weights of a code, then stages."""
        name = f"codebook{self.bits}" + (f"x{self.dim}" if self.dim > 1 else "")
        return name + (f" in {self.stages} stages" if self.stages > 1 else "")

    def vector_dim(self, shape: Sequence[int], contract_dims: Sequence[int]) -> int:
        """The dim along which neighbours are coded together.

        Raises:
            ValueError: there is none that `dim` divides.
        """
        last = max(contract_dims)
        if shape[last] % self.dim:
            fitting = [n for n in range(1, shape[last] + 1) if shape[last] % n == 0]
            raise ValueError(
                f"a code stands for {self.dim} weights along the last summed dim, of "
                f"length {shape[last]}: choose a dim among {fitting}."
            )
        return last

    def blocks(
        self,
        shape: Sequence[int],
        contract_dims: Sequence[int],
        batch_dims: Sequence[int] = (),
    ) -> tuple[int, ...]:
        """How many neighbours along each dim share codebooks.

        Raises:
            ValueError: blocks of so many outputs, or codes of so many weights, do
                not fit.
        """
        self.vector_dim(shape, contract_dims)
        kept = {*contract_dims, *batch_dims}
        sizes = [shape[d] if d in contract_dims else 1 for d in range(len(shape))]
        outputs = [d for d in range(len(shape)) if d not in kept]
        fill_blocks(sizes, shape, outputs, self.outputs, "output")
        return tuple(sizes)
