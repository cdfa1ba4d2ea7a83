"""One GPT, trained on the bytes of a text from the start, in several ways.

What the benchmarks share that compare such ways: their options, the network and its
optimizer, and a file of rows that a second run goes on from.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from jaxeff.data import text
from jaxeff.models import build
from jaxeff.training import forms
from jaxeff.training.results import about, rows_so_far, write_json
from scripts.bench.subjects import cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of each such benchmark."""

    data: Path
    """A text; its last tenth is kept back."""
    ways: tuple[str, ...] = ()
    """Only these; all by default."""
    steps: int = 600
    """Of training."""
    batch_size: int = 64
    """Windows of a step, over all devices."""
    length: int = 64
    """Tokens of a window."""
    d_model: int = 128
    """Width of the transformer."""
    n_layers: int = 4
    """Its layers."""
    learning_rate: float = 2e-3
    """Of AdamW, at its peak; a cosine takes it to zero."""
    output: Path
    """JSON file for the results, and to go on from."""

    @property
    def rate(self) -> optax.Schedule:
        """The learning rate of each step."""
        return cosine(self.learning_rate, self.steps)


class Language(NamedTuple):
    """A GPT that is trained on the bytes of a text from the start.

    Attributes:
        params: to begin with.
        eval_fn, train_fn: the model; see `training.forms`.
        train, held_back: the text, and its last tenth.
    """

    params: Any
    eval_fn: Callable
    train_fn: Callable
    train: np.ndarray
    held_back: np.ndarray


def language(c: Options) -> Language:
    """That of the options, with random weights that are always the same."""
    train, held_back = text(c.data)
    model = build("gpt", vocab_size=256, d_model=c.d_model, n_layers=c.n_layers)
    params = jax.jit(model.init)(jr.key(0), jnp.zeros((1, c.length), jnp.int32))
    eval_fn, train_fn = forms(model, params)
    plain = lambda params, tokens: eval_fn(params, tokens)
    return Language(params, plain, train_fn, train, held_back)


# Adam's memory of squares. With 0.999 and without clipping, a thousandth more or less
# in the weights at the start made the loss after 600 steps 2.12 or 2.52.
DECAY = 0.99


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    """As language models are trained: gradients clipped to norm 1, then AdamW."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=DECAY))


def every_way(
    c: Options,
    ways: Iterable[str],
    measure: Callable[[str], dict[str, Any]],
    **more: Any,
) -> list[dict[str, Any]]:
    """A row of each way asked for, and of the first, which others are compared with.

    Args:
        c: the options.
        ways: all there are.
        measure: trains in one way; the row has the way's name as "way".
        **more: what else decides the numbers of a row.

    Raises:
        ValueError: a way that is none, or a file of rows made with other options.
    """
    first, *_ = ways = tuple(ways)
    if unknown := [name for name in c.ways if name not in ways]:
        raise ValueError(
            f"there is no way {unknown[0]!r}. Choose of: {', '.join(ways)}."
        )
    given = vars(c).items()
    options = {k: v for k, v in given if k not in ("data", "ways", "output")} | more
    rows = rows_so_far(c.output, options)
    done = {r["way"] for r in rows}
    for name in dict.fromkeys([first, *(c.ways or ways)]):
        if name in done:
            continue
        print(name, flush=True)
        rows.append(measure(name))
        write_json(c.output, about() | {"options": options, "rows": rows})
    return rows
