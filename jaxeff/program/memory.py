"""What a long calibration has done, in a folder, so that it can go on from there."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxeff.tree import is_array

from .call import Call
from .files import NEW, write_file
from .lift import unlift
from .uses import Part

_ABOUT = "about.json"


class Memory:
    """The parts of weights that are done, a file for each.

    A file is written whole or not at all. The folder may be deleted once the result
    is saved.

    Args:
        folder: made where missing.
        of: all that the result depends on: the program, weights, data, options. A
            folder holds parts of one such run only.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: str | Path, of: PyTree):
        self.folder = Path(folder)
        about, mine = self.folder / _ABOUT, {"of": _digest(of)}
        if about.is_file():
            if json.loads(about.read_text()) != mine:
                raise ValueError(
                    f"{self.folder} holds parts of a calibration of another model, or "
                    "with other weights, data or options. Name another folder, or "
                    "delete it."
                )
            return
        # What was killed in its first moment left but a file that is not whole.
        others = self.folder.glob("*") if self.folder.is_dir() else ()
        if any(not path.name.endswith(NEW) for path in others):
            raise ValueError(
                f"{self.folder} holds files that are no parts of a calibration. Name "
                "a new folder."
            )
        write_file(about, lambda file: file.write(json.dumps(mine).encode()))

    @classmethod
    def at(
        cls,
        folder: str | Path | None,
        fn: Callable,
        params: PyTree,
        batches: Sequence[tuple],
        *options: Any,
    ) -> "Memory | None":
        """Of a calibration of `fn` in a folder; None without one.

        Args:
            folder: or None.
            fn, params, batches: as for `calibrate`.
            options: what else the result depends on.
        """
        if folder is None:
            return None
        program = ""
        if batches:
            # Functions are printed with where they lie in memory.
            text = str(Call(unlift(fn), params, batches[0], {}).jaxpr)
            program = re.sub(r" at 0x[0-9a-f]+", "", text)
        return cls(folder, (program, params, list(batches), options))

    def get(self, part: Part) -> dict[str, np.ndarray] | None:
        """What was put for a part; None if it is not done."""
        path = self._path(part)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def put(self, part: Part, arrays: Mapping[str, Any]) -> None:
        """Remembers arrays of NumPy's own dtypes for a part that is done."""
        values: dict[str, Any] = {name: np.asarray(x) for name, x in arrays.items()}
        write_file(self._path(part), lambda file: np.savez(file, **values))

    def _path(self, part: Part) -> Path:
        # A weight's path may hold what a file's name cannot.
        name = hashlib.sha256(part.path.encode()).hexdigest()[:16]
        return self.folder / f"{name}-{part.index}.npz"


def _digest(of: PyTree) -> str:
    found = hashlib.sha256()
    leaves, treedef = jax.tree.flatten(of)
    found.update(str(treedef).encode())
    for x in leaves:
        if not is_array(x):
            found.update(repr(x).encode())
            continue
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        found.update(f"{x.shape} {x.dtype}".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()
