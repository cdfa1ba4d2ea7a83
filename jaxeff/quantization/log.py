"""What rounding did to each weight, while it did it."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxeff.program import table

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Entry:
    """A weight that was rounded, or a part of it that its data meets apart.

    Attributes:
        path: of the weight.
        part: number of the part, in the order in which they are used.
        format: what it was rounded to.
        error: root of the summed squared rounding errors over that of the summed
            squared weights; None: only shapes are known.
        output_error: the same for what it computes of the calibration data; None: it
            was rounded without.
        seconds: since the entry before it, or since the log was made: running the
            model up to there, statistics and rounding.
    """

    path: str
    part: int
    format: str
    error: float | None
    output_error: float | None
    seconds: float


class Log:
    """Collects an entry for each weight; `print` shows them as a table.

    Pass one as `log=` to `quantize`, `gptq`, `adaround` or `awq`.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._last = time.perf_counter()

    def add(
        self,
        path: str,
        part: int,
        format: str,
        error: float | None,
        output_error: float | None = None,
    ) -> None:
        """Adds an entry that took the time since the last one."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.entries.append(Entry(path, part, format, error, output_error, seconds))

    def __str__(self) -> str:
        head = ("weight", "format", "weights off by", "outputs off by", "seconds")
        parts = {e.path for e in self.entries if e.part}
        percent = lambda x: "" if x is None else f"{x:.2%}"
        cells = [
            (
                f"{e.path}[{e.part}]" if e.path in parts else e.path,
                e.format,
                percent(e.error),
                percent(e.output_error),
                f"{e.seconds:.2f}",
            )
            for e in self.entries
        ]
        seconds = sum(e.seconds for e in self.entries)
        return table(head, [*cells, ("all", "", "", "", f"{seconds:.2f}")])


@jax.jit
def errors(
    old: Float[Array, "groups rows cols"],
    new: Float[Array, "groups rows cols"],
    h: Float[Array, "groups cols cols"],
) -> tuple[Array, Array]:
    """How far a part is from what it was, and its outputs, both relative.

    Args:
        old, new: the matrices.
        h: x^T x of their inputs.
    """

    def size(d: Any) -> Array:
        product = jnp.einsum("gri,gij->grj", d, h, precision=_HIGHEST)
        return jnp.sum(product * d)

    ratio = lambda a, b: jnp.sqrt(jnp.maximum(a, 0) / jnp.where(b > 0, b, 1))
    d = new - old
    return ratio(jnp.sum(d * d), jnp.sum(old * old)), ratio(size(d), size(old))
