"""Checkpoints of a training run, saved by Orbax in the background. Each is complete or absent; the latest few are kept.

    OUTPUT/checkpoint_0005000/state      every leaf of the training state, float32 or int32
    OUTPUT/checkpoint_0005000/meta       a description of the run: step, position in the data, hashes, flags (JSON)
    OUTPUT/checkpoint_0005000/lora       the adapters in PEFT's layout, for PyTorch users
    OUTPUT/checkpoint_0005000/model      instead of `lora` where whole networks are trained: a folder in diffusers' layout

The frozen base is saved only as a hash. `lora` and `model` are for other programs; resuming needs neither.

Each process writes and reads only the parts of arrays that its own devices hold. The first process makes the exported files
in the end, from the saved state, one array at a time: where a network is spread over many devices, no process ever holds
all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tsdsr_jax import peers
from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.tensor_files import TensorStream, save_tensors, write_tensors

PREFIX, DIGITS = "checkpoint", 7
STATE, META, LORA, MODEL = "state", "meta", "lora", "model"
META_KEYS = {"step", "samples", "rows", "identity", "options"}
# File name -> tensors or text.
Files = Mapping[str, TensorStream | Mapping[str, np.ndarray] | str]
# Saved state -> files. It is called by the first process only, in the background. The state's leaves are `StoredArray`s.
Export = Callable[[Any], Files]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A leaf of a saved state. `numpy.asarray` reads its values.

    Attributes:
      shape, dtype: the array's.
      folder: the checkpoint's `state`.
      name: the leaf's name there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    folder: Path
    name: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # A handler without the checkpointer around it, which would wait for the other processes.
        wanted = ocp.args.PyTreeRestore(
            {self.name: 0}, {self.name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        array = np.asarray(ocp.PyTreeCheckpointHandler().restore(self.folder, args=wanted)[self.name])
        return array if dtype is None else array.astype(dtype, copy=False)


_ONLY_FIRST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class _ExportHandler(ocp.AsyncCheckpointHandler):
    """Writes extra files into a checkpoint, in the background, when its state has been written.

    They appear together with the rest of the checkpoint. If they cannot be written, it appears without them.

    Attributes:
      failed: why the latest export could not be written; None if it was.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self._next: _ExportSave | None = None

    async def async_save(self, directory: Path, args: _ExportSave) -> list[ocp.future.Future]:
        self.save(directory, args)
        return []

    def save(self, directory: Path, args: _ExportSave) -> None:
        self._next = args

    def finalize(self, directory: Path) -> None:
        """Called in the first process, in the background, when all processes have written their parts."""
        assert self._next
        self.failed = None
        folder = Path(directory)
        try:
            for name, content in self._next.export(_stored(self._next.shapes, folder.parent / STATE)).items():
                _write_file(folder / name, content)
        except Exception as error:  # from the disk or from making the files; resuming needs none of them
            self.failed = reason_of(error)
            with suppress(OSError):  # on a file system that fails, what was written may stay
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore(self, directory: Path, args: Any = None) -> None:
        raise NotImplementedError("these files are exported only")


def _stored(shapes: Any, folder: Path) -> Any:
    """A state in a checkpoint's folder, with a `StoredArray` for each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: StoredArray(leaf.shape, np.dtype(leaf.dtype), folder, leaf_name(path)), shapes
    )


def _write_file(path: Path, content: TensorStream | Mapping[str, np.ndarray] | str) -> None:
    metadata = {"format": "pt"}
    if isinstance(content, str):
        with replacing(path) as temporary:
            temporary.write_text(content)
    elif isinstance(content, TensorStream):
        write_tensors(path, content.specs, content.make(), metadata)
    else:
        save_tensors(path, content, metadata)


@ocp.args.register_with_handler(_ExportHandler, for_save=True)
@dataclasses.dataclass
class _ExportSave(ocp.args.CheckpointArgs):
    export: Export
    shapes: Any


@ocp.args.register_with_handler(_ExportHandler, for_restore=True)
@dataclasses.dataclass
class _ExportRestore(ocp.args.CheckpointArgs):
    """Required by Orbax as the counterpart of `_ExportSave`; nothing is restored from these files."""


class Checkpoints:
    """The checkpoints in a run's output folder.

    Args:
      folder: the run's output folder.
      keep: how many of the latest checkpoints to keep; None keeps all.
      note: called with a one-line message when a checkpoint could not be saved.
      export: name of the folder of exported files.
      timeout: seconds in which a checkpoint must be saved where several processes save it together.
      alone: the first process saves, and the others have nothing to do with it; they need not share the folder. For states
        of which each process has a copy.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None,
        note: Callable[[str], object],
        export: str = LORA,
        timeout: int = 1800,
        alone: bool = False,
    ):
        self.folder, self.keep, self.note, self.export = folder.resolve(), keep, note, export
        self.timeout, self.alone = timeout, alone and jax.process_count() > 1
        self.failed: str | None = None
        self._pending: int | None = None  # the step that is being saved
        self._exports = _ExportHandler()
        _quiet()
        self._manager: Any = None if self.absent else self._open()

    @property
    def absent(self) -> bool:
        """Whether another process saves."""
        return self.alone and jax.process_index() > 0

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                step_name_format=ocp.path.step.standard_name_format(
                    step_prefix=PREFIX, step_format_fixed_length=DIGITS
                ),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=self.timeout),
                multiprocessing_options=_ONLY_FIRST if self.alone else ocp.options.MultiprocessingOptions(),
                create=not self.alone,
            ),
            # They are finished in this order: the exported files are made from the finished state.
            item_handlers={
                STATE: ocp.StandardCheckpointHandler(),
                META: ocp.JsonCheckpointHandler(),
                self.export: self._exports,
            },
        )

    def check(self, state: Any) -> None:
        """Raises UserError, in every process, if this state cannot be saved here."""
        if self.alone and not all(is_here(leaf) for leaf in jax.tree.leaves(state)):
            raise UserError(
                f"--output_dir {self.folder}: several processes that share one network (--fsdp) cannot save it in an object "
                "store; give a folder on a file system that they share"
            )

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}_{step:0{DIGITS}d}"

    def save(self, step: int, state: Any, meta: Mapping[str, Any], export: Export) -> bool:
        """Starts to save a checkpoint. Returns when this process's part of the state is copied to the host; the rest is done
        in the background.

        A failure of this save or the previous one does not end the run: it is noted, and existing checkpoints stay.
        `failed` holds the reason until a later save succeeds. If only the exported files cannot be written, the checkpoint
        is kept without them, which is noted, too.

        Returns:
          Whether the save has started.
        """
        if self.absent:
            return True
        if self.alone:
            state = to_host(state)  # Orbax takes no other arrays that one process has for itself
        if not self.wait():
            self.note("the previous checkpoint was not saved; saving a new one now")
        try:
            args = {
                STATE: ocp.args.StandardSave(leaves_by_name(state)),
                META: ocp.args.JsonSave(dict(meta)),
                self.export: _ExportSave(export, shapes_of(state)),
            }
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except (
            Exception
        ) as error:  # from the disk, the file system or Orbax: whatever it is, training continues
            self._give_up(error)
            return False
        self._pending = step
        return True

    def wait(self) -> bool:
        """Waits for the save in progress, if any; returns whether it succeeded."""
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not self.path(step).is_dir():
                raise OSError(f"{self.path(step)} is missing")
        except Exception as error:  # as above
            self._give_up(error)
            return False
        self.failed = None
        if self.unexported:
            self.note(
                f"{self.path(step)}: {self.export} could not be written ({self.unexported}); the checkpoint can be "
                "resumed, training continues"
            )
        return True

    @property
    def unexported(self) -> str | None:
        """Why the latest checkpoint lacks its exported files; None if it has them."""
        return self._exports.failed

    def _give_up(self, error: Exception) -> None:
        reason = reason_of(error)
        if jax.process_count() > 1:
            # The other processes do not know about it, and this one cannot continue without them. Unless the reason is
            # the disk, it may be that one of them has ended.
            if not isinstance(error, OSError):
                peers.wait_for_reason()
            raise UserError(
                f"{self.folder}: a checkpoint could not be saved ({reason}); earlier ones are kept"
            ) from None
        self.failed = reason
        self.note(
            f"{self.folder}: a checkpoint could not be saved ({reason}); earlier ones are kept, training continues"
        )
        # A new manager: the old one still counts the failed checkpoint, and may have counted an old one as removed.
        with suppress(Exception):  # it raises the same error again
            self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        if self._manager:
            self._manager.close()


def _quiet() -> None:
    """Silences Orbax, which logs every step it takes and prints a traceback for failures that it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def reason_of(error: BaseException) -> str:
    """Returns the part of a long error message that a user needs."""
    text = str(error)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    for phrase in ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied",
                   "Read-only file system"):  # fmt: skip
        if phrase.lower() in text.lower():
            return phrase
    return (text.strip() or type(error).__name__).split("\n")[0][:300]


def to_host(state: Any) -> Any:
    """Copies every leaf to the host; later training steps do not change the copies."""
    for leaf in jax.tree.leaves(state):
        if is_here(leaf):
            leaf.copy_to_host_async()
    return jax.tree.map(leaf_to_host, state)


def leaves_by_name(state: Any) -> dict[str, Any]:
    """The leaves of a state by their names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {leaf_name(path): leaf for path, leaf in leaves}


def is_here(leaf: jax.Array) -> bool:
    """Whether this process holds the whole array."""
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def leaf_to_host(leaf: jax.Array) -> np.ndarray:
    """Copies an array to the host. If several processes hold parts of it, it is gathered, and every process must call
    this."""
    whole = leaf if is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(whole, copy=True)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def find(folder: Path, wanted: str) -> Path | None:
    """Finds the checkpoint that `--resume_from_checkpoint` names.

    Args:
      folder: the run's output folder.
      wanted: "latest", or a checkpoint's path or name.

    Returns:
      Its folder; None for "latest" if there is no checkpoint yet.

    Raises:
      UserError: there is no such checkpoint, or it is incomplete.
    """
    if wanted == "latest":
        # Checks the entry's own name, too: a link with a different name was made by the user.
        numbered = (path for path in folder.glob(f"{PREFIX}_*") if re.fullmatch(rf"{PREFIX}_\d+", path.name))
        found = [(step, path) for path in numbered if (step := step_of(path)) is not None]
        return max(found)[1] if found else None
    for path in (Path(wanted), folder / wanted):
        if path.is_dir():
            if step_of(path) is None or not (path / META).is_dir():
                inside = [str(p) for p in sorted(path.glob(f"{PREFIX}_*")) if step_of(p) is not None]
                hint = f"; did you mean {inside[-1]}?" if inside else ""
                raise UserError(
                    f"{path}: not a checkpoint of this program (expected a folder named {PREFIX}_NUMBER){hint}"
                )
            return path
    raise UserError(
        f"--resume_from_checkpoint {wanted}: no such checkpoint; expected latest, or a {PREFIX}_NUMBER folder"
    )


def step_of(path: Path) -> int | None:
    """Returns the step of a complete checkpoint's folder; None for anything else."""
    path = path.resolve()  # a link may have another name, and `..` has none
    match = re.fullmatch(rf"{PREFIX}_(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() and ocp.utils.is_checkpoint_finalized(path) else None


def read_meta(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's `meta`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        meta = ocp.JsonCheckpointHandler().restore(path / META)
        missing = sorted(META_KEYS - meta.keys())
    except Exception as error:  # damaged in any way
        raise UserError(
            f"{path}: this checkpoint cannot be read ({reason_of(error)}); move it away and resume from an earlier one"
        ) from None
    if missing:
        raise UserError(
            f"{path}: this checkpoint's {META} lacks {', '.join(missing)}; move it away and resume from an earlier one"
        )
    return meta


def read_state(path: Path, like: Any) -> Any:
    """Reads a checkpoint's state in the structure of `like` (a `TrainState`).

    Checkpoints of earlier versions, whose leaves had other names, are read, too.

    Args:
      path: the checkpoint.
      like: what each leaf is to be. A `jax.ShapeDtypeStruct` with a sharding becomes an array on these devices, of which
        each process reads its own part; anything else with a shape becomes a host array.

    Raises:
      UserError: it is damaged or has another structure; the message names the first leaves that differ.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(key) for key, _ in leaves]
    state = path.resolve() / STATE  # Orbax needs an absolute path
    _quiet()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(state).item_metadata
            if stored is None:
                raise OSError(0, f"{STATE} is missing or damaged")
            stored = stored.tree if hasattr(stored, "tree") else stored
            names = _stored_names(names, stored)
            target = {name: _target(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
            _check_leaves(path, target, stored)
            found = checkpointer.restore(state, target)
    except UserError:
        raise
    except Exception as error:  # damaged in any way
        raise UserError(
            f"{path}: this checkpoint cannot be read ({reason_of(error)}); move it away and resume from an earlier one"
        ) from None
    return jax.tree_util.tree_unflatten(structure, [found[name] for name in names])


def _target(leaf: Any) -> Any:
    """What Orbax is to make of a stored leaf."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
        return leaf
    return np.empty(leaf.shape, leaf.dtype)


# Today's leaf names (a pattern), and what they were before all networks shared one kind of state.
_EARLIER_NAMES = (
    (r"trained\.(student|auxiliary)\.", r"\1."),
    (r"optimizer\.(student|auxiliary)\.", r"\1_optimizer."),
    (r"ema\.student\.", "ema."),
    (r"(trained|optimizer|ema)\.network\.", r"\1."),
)


def _stored_names(names: Sequence[str], stored: Mapping[str, Any]) -> list[str]:
    """Returns the names of a state's leaves in a checkpoint: the current names, or those of an earlier version."""
    earlier = list(names)
    for pattern, replacement in _EARLIER_NAMES:
        earlier = [re.sub(f"^{pattern}", replacement, name) for name in earlier]
    return earlier if not set(names) <= stored.keys() and set(earlier) <= stored.keys() else list(names)


def _check_leaves(path: Path, target: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in target if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in target]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, expected {target[name].shape}"
        for name in target
        if name in stored and tuple(stored[name].shape) != target[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: does not fit this run: {'; '.join(problems[:5])}{more}")


class Hash:
    """A hash of named arrays, over their values in the order they are added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, array: np.ndarray) -> None:
        self._digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        self._digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def value(self) -> str:
        return self._digest.hexdigest()
