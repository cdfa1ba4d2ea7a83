"""Checkpoints by Orbax: of runs, in the background, and of finished models.

A tree is stored as a flat dict of its arrays by path, and beside it, as JSON, an
index of their shapes and dtypes and whatever the caller wants to remember. Its
structure is not stored: it comes from the tree one restores into, so compressed
leaves, optimizer states and keys need no code of their own. Orbax writes into a
temporary folder and renames it, so what has its final name is whole.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from jaxeff.tree import is_array, path_name

FORMAT = "jaxeff 1"


class Checkpoints:
    """The last few states of one run, in folders named by their steps.

    Law: restoring the state of step s and going on from batch s gives, bit for
    bit, the run that was never stopped.

    Use it in a `with` block, or call `close`: the last save may still be running.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3):
        """Opens a folder, made if it is missing.

        Args:
            folder: of this run alone; what a killed run left half-written in it
                is removed. With several processes, one that all of them see.
            keep: how many checkpoints stay; older ones are deleted.
        """
        if keep < 1:
            raise ValueError(f"keep counts checkpoints, so at least 1, got {keep}.")
        self.folder = Path(folder).resolve()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"checkpoints need a folder, but {folder} is a file. Name another."
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or `None`."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps there are, oldest first."""
        return sorted(self._manager.all_steps())

    def check_newer(self, step: int) -> None:
        """Refuses a step that the folder is already past.

        Raises:
            ValueError: there is a checkpoint of `step` or a later one.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"a run's checkpoints are of growing steps, but {self.folder} holds "
                f"step {latest} and this one is {step}. Resume from that checkpoint, "
                "or choose another folder."
            )

    def save(self, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Starts to save; returns when the state may be donated.

        Args:
            state: a pytree, of step `state.step`.
            meta: anything JSON can hold.

        Raises:
            ValueError: the folder holds this step or a later one.
        """
        step = int(state.step)
        self.check_newer(step)
        self._manager.save(step, args=_to_save(state, meta))

    def restore(self, like: PyTree, step: int | None = None) -> PyTree:
        """A saved state.

        Args:
            like: a state, or its shapes (`jax.eval_shape`), of the same model and
                optimizer. Each array comes back with the sharding it has there,
                or else on the default device.
            step: which one; the newest by default.

        Raises:
            ValueError: no such checkpoint, one of another model, or a damaged one.
        """
        if step is None:
            step = self.latest()
        if step not in self.steps():
            raise ValueError(
                f"{self.folder} has no checkpoint {'' if step is None else step}: it "
                f"holds the steps {self.steps()}. Name another folder or step."
            )
        self.wait()
        read = lambda args: self._manager.restore(step, args=args)
        return _restore(read, like, f"{self.folder / str(step)}")[0]

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the background threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of the whole states in a folder of `Checkpoints`, in order.

    It reads names alone, so it can be asked where other processes don't answer. What
    is being written has another name.
    """
    return sorted(int(p.name) for p in Path(folder).glob("*") if p.name.isdecimal())


def save_params(
    path: str | Path,
    params: PyTree,
    meta: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Saves the arrays of a model, dense or compressed, in the folder `path`.

    Args:
        path: the folder to make.
        params: any tree; leaves that are not arrays are not saved.
        meta: anything JSON can hold, for `load_meta`: how the model was made.
        overwrite: delete a checkpoint that is there, then save.

    Raises:
        ValueError: there is something at `path` already; with `overwrite`,
            something that is not a checkpoint.
    """
    path = Path(path).resolve()
    args = _to_save(params, meta)
    with _checkpointer() as checkpointer:
        if path.exists():
            if not overwrite:
                raise ValueError(
                    f"a new checkpoint needs a new folder, but {path} exists. Name "
                    "another, or pass overwrite=True."
                )
            # Never delete a folder that is something else.
            _read_meta(_reader(checkpointer, path), str(path))
        checkpointer.save(path, args, force=overwrite)


def load_params(path: str | Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """What `save_params` saved: the parameters and the meta.

    Args:
        path: the folder.
        like: the tree or its shapes (`jax.eval_shape`), compressed leaves
            included. Each array comes back with the sharding it has there, or
            else on the default device; what is not an array stays as it is.

    Raises:
        ValueError: no checkpoint there, one of another model, or a damaged one.
    """
    path = Path(path).resolve()
    with _checkpointer() as checkpointer:
        return _restore(_reader(checkpointer, path), like, str(path))


def load_meta(path: str | Path) -> dict[str, Any]:
    """The meta alone: enough to build what `load_params` restores into.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    path = Path(path).resolve()
    with _checkpointer() as checkpointer:
        return _read_meta(_reader(checkpointer, path), str(path))["meta"]


Reader = Callable[[ocp.args.Composite], Any]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _reader(checkpointer: ocp.Checkpointer, path: Path) -> Reader:
    return lambda args: checkpointer.restore(path, args)


def _arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays by path, and only those with entries: Orbax refuses empty ones."""
    leaves = [
        (path_name(keypath), x)
        for keypath, x in jax.tree_util.tree_leaves_with_path(tree)
        if is_array(x)
    ]
    names = [name for name, _ in leaves]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"a checkpoint stores arrays by path, but two share {twice[0]!r}. "
            "Rename one."
        )
    return {name: x for name, x in leaves if x.size}


def _index(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{list(x.shape)} {x.dtype}" for name, x in arrays.items()}


def _to_save(tree: PyTree, meta: Mapping[str, Any] | None) -> ocp.args.Composite:
    arrays = _arrays(tree)
    meta = dict(meta or {})
    try:
        json.dumps(meta)
    except TypeError as error:
        raise ValueError(
            f"meta is saved as JSON, but {error}. Use numbers, strings, lists and "
            "dicts with string keys."
        ) from error
    about = {"format": FORMAT, "arrays": _index(arrays), "meta": meta}
    return ocp.args.Composite(
        about=ocp.args.JsonSave(about), arrays=ocp.args.StandardSave(arrays)
    )


def _read_meta(read: Reader, where: str) -> dict[str, Any]:
    if not (Path(where) / "about").is_dir():
        raise ValueError(
            f"{where} must be a checkpoint, but is "
            f"{'another folder' if Path(where).exists() else 'missing'}. "
            "Name the folder that was saved."
        )
    args = ocp.args.Composite(about=ocp.args.JsonRestore())
    about = _whole(read, args, where)["about"]
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{where} must have the format {FORMAT!r}, but has "
            f"{about.get('format')!r}. Read it with the version that wrote it."
        )
    return about


def _restore(read: Reader, like: PyTree, where: str) -> tuple[PyTree, dict[str, Any]]:
    wanted = _arrays(like)
    about = _read_meta(read, where)
    _check_same(about["arrays"], _index(wanted), where)
    default = SingleDeviceSharding(jax.local_devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default
        )
        for name, x in wanted.items()
    }
    found: dict[str, Any] = {}
    if shapes:
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))
        found = _whole(read, args, where)["arrays"]

    def fill(keypath, x):
        if not is_array(x):
            return x
        return found[path_name(keypath)] if x.size else jnp.zeros(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, like), about["meta"]


def _whole(read: Reader, args: ocp.args.Composite, where: str) -> Any:
    try:
        return read(args)
    except Exception as error:  # of many kinds, by what is damaged
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"every file of {where} must be as it was saved, but reading failed: "
            f"{type(error).__name__}: {said[0][:200]}. The checkpoint is damaged: use "
            "another."
        ) from error


def _check_same(
    saved: Mapping[str, str], wanted: Mapping[str, str], where: str
) -> None:
    differences = [
        f"{name} is {saved.get(name, 'missing')} there and "
        f"{wanted.get(name, 'missing')} here"
        for name in [*saved, *(name for name in wanted if name not in saved)]
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"a checkpoint restores into the model it was made of, but {where} differs "
            f"in {len(differences)} arrays: "
            f"{'; '.join(differences[:3])}. Build the same model, or name its own "
            "checkpoint."
        )
