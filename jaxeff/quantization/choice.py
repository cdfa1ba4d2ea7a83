"""What becomes of each array among the weights."""

import dataclasses

from .codebook import Codebook
from .formats import Format

AnyFormat = Format | Codebook


@dataclasses.dataclass(frozen=True)
class Choice:
    """A format for one array, or the reason why none.

    Attributes:
        path: of the array; inside a compressed weight, that of its part.
        weight: path of the weight it is or belongs to.
        contract, batch: dims that share a scale, and that are sliced.
    """

    path: str
    weight: str
    format: AnyFormat | None
    reason: str = ""
    contract: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
