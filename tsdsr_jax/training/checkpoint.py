"""Checkpoints of a training run, with Orbax: complete or absent, the state written in the background, the latest few kept.

    OUTPUT/checkpoint_0005000/state      every leaf of the training state, float32 or int32
    OUTPUT/checkpoint_0005000/meta       what the run was: step, place in the data, hashes, flags (JSON)
    OUTPUT/checkpoint_0005000/lora       the adapters as PyTorch users load them (PEFT's layout); where whole networks are
                                         trained, `model` instead, a checkpoint folder in diffusers' layout

The frozen base is not saved, only its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.tensor_files import save_tensors

PREFIX, DIGITS = "checkpoint", 7
STATE, META, LORA, MODEL = "state", "meta", "lora", "model"
META_KEYS = {"step", "samples", "rows", "identity", "options"}
# File name -> its tensors, or its text.
Files = Mapping[str, Mapping[str, np.ndarray] | str]


class _FilesHandler(ocp.CheckpointHandler):
    """Writes files into a checkpoint, so that they appear with the rest of it or not at all."""

    def save(self, directory: Path, args: _FilesSave) -> None:
        if jax.process_index() == 0:
            for name, content in args.files.items():
                path = Path(directory) / name
                if isinstance(content, str):
                    with replacing(path) as temporary:
                        temporary.write_text(content)
                else:
                    save_tensors(path, content, {"format": "pt"})

    def restore(self, directory: Path, args: Any = None) -> None:
        raise NotImplementedError("these files are for others to read")


@ocp.args.register_with_handler(_FilesHandler, for_save=True)
@dataclasses.dataclass
class _FilesSave(ocp.args.CheckpointArgs):
    files: Files


@ocp.args.register_with_handler(_FilesHandler, for_restore=True)
@dataclasses.dataclass
class _FilesRestore(ocp.args.CheckpointArgs):
    """Orbax wants a pair; nothing is restored from these files."""


class Checkpoints:
    """The checkpoints in a run's output folder.

    Args:
      folder: the run's output folder.
      keep: how many of the latest to keep; None: all.
      note: told, in a line, when one could not be saved.
      export: name of the folder of files for others.
    """

    def __init__(self, folder: Path, keep: int | None, note: Callable[[str], object], export: str = LORA):
        self.folder, self.keep, self.note, self.export = folder.resolve(), keep, note, export
        self.failed: str | None = None
        self._pending: int | None = None  # the step being saved
        _quiet()
        self._manager = self._open()

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
            ),
            item_names=(STATE, META, self.export),
            item_handlers={self.export: _FilesHandler()},
        )

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}_{step:0{DIGITS}d}"

    def save(self, step: int, state: Any, meta: Mapping[str, Any], files: Files) -> bool:
        """Starts to save; returns before the state is written, though after `files` are, and no longer needs `state`.

        A failure, of this or of the save before, does not end the run: it is noted, and the checkpoints that there are
        stay. `failed` says so until a later save succeeds.

        Returns:
          Whether the save has begun.
        """
        if not self.wait():
            self.note("the checkpoint before this one was not saved; trying again with this one")
        try:
            args = {
                STATE: ocp.args.StandardSave(to_host(state)),
                META: ocp.args.JsonSave(dict(meta)),
                self.export: _FilesSave(files),
            }
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except (
            Exception
        ) as error:  # the disk, the file system's client, Orbax: whatever it is, training goes on
            self._give_up(error)
            return False
        self._pending = step
        return True

    def wait(self) -> bool:
        """Waits for the save under way; whether it, if any, is complete."""
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not self.path(step).is_dir():
                raise OSError(f"{self.path(step)} is not there")
        except Exception as error:  # as above
            self._give_up(error)
            return False
        self.failed = None
        return True

    def _give_up(self, error: Exception) -> None:
        reason = reason_of(error)
        if jax.process_count() > 1:
            # The others know nothing of it, and none could go on without them.
            raise UserError(
                f"{self.folder}: a checkpoint could not be saved ({reason}); earlier ones are kept"
            ) from None
        self.failed = reason
        self.note(
            f"{self.folder}: a checkpoint could not be saved ({reason}); earlier ones are kept, training goes on"
        )
        # A new manager: the old one believes in the checkpoint that failed, and perhaps in the removal of an old one.
        with suppress(Exception):  # it raises the same error again
            self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _quiet() -> None:
    """Orbax reports every step it takes, and failures with a traceback besides raising them."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def reason_of(error: BaseException) -> str:
    """The part of a long error that a person needs."""
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


def to_host(state: Any) -> dict[str, np.ndarray]:
    """Leaf name -> a host copy of every leaf, which later steps do not reach."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    for _, leaf in leaves:
        if is_here(leaf):
            leaf.copy_to_host_async()
    return {leaf_name(path): on_host(leaf) for path, leaf in leaves}


def is_here(leaf: jax.Array) -> bool:
    """Whether this process has all of an array."""
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def on_host(leaf: jax.Array) -> np.ndarray:
    """A host copy, gathered from the other processes where they have parts; all processes must ask for it."""
    return np.array(leaf if is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True), copy=True)


def leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def find(folder: Path, wanted: str) -> Path | None:
    """The checkpoint a `--resume_from_checkpoint` flag means.

    Args:
      folder: the run's output folder.
      wanted: "latest", or a checkpoint's path or name.

    Returns:
      Its folder; None for "latest" where there is none yet.

    Raises:
      UserError: no such checkpoint, or an incomplete one.
    """
    if wanted == "latest":
        # By their own names, too: a link with another is the user's.
        numbered = (path for path in folder.glob(f"{PREFIX}_*") if re.fullmatch(rf"{PREFIX}_\d+", path.name))
        found = [(step, path) for path in numbered if (step := step_of(path)) is not None]
        return max(found)[1] if found else None
    for path in (Path(wanted), folder / wanted):
        if path.is_dir():
            if step_of(path) is None or not (path / META).is_dir():
                inside = [str(p) for p in sorted(path.glob(f"{PREFIX}_*")) if step_of(p) is not None]
                hint = f"; did you mean {inside[-1]}?" if inside else ""
                raise UserError(
                    f"{path}: not a checkpoint of this program (they are called {PREFIX}_NUMBER){hint}"
                )
            return path
    raise UserError(
        f"--resume_from_checkpoint {wanted}: no such checkpoint; expected latest, or a {PREFIX}_NUMBER folder"
    )


def step_of(path: Path) -> int | None:
    """The step of a complete checkpoint's folder, None for anything else."""
    path = path.resolve()  # a link may be called otherwise, and `..` is no name
    match = re.fullmatch(rf"{PREFIX}_(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() and ocp.utils.is_checkpoint_finalized(path) else None


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's `meta`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        meta = ocp.JsonCheckpointHandler().restore(path / META)
        missing = sorted(META_KEYS - meta.keys())
    except Exception as error:  # damaged in whatever way
        raise UserError(
            f"{path}: this checkpoint cannot be read ({reason_of(error)}); resume from another"
        ) from None
    if missing:
        raise UserError(f"{path}: this checkpoint's {META} lacks {', '.join(missing)}; resume from another")
    return meta


def read_state(path: Path, like: Any) -> Any:
    """A checkpoint's state, as host arrays in the structure of `like` (a `TrainState` of arrays or shapes).

    Checkpoints of earlier versions are read by the names that their leaves had.

    Raises:
      UserError: damaged, or of another structure; the first leaves that differ are named.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(key) for key, _ in leaves]
    state = path.resolve() / STATE  # Orbax finds nothing by a relative path
    _quiet()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(state).item_metadata
            if stored is None:
                raise OSError(0, f"{STATE} is missing or damaged")
            stored = stored.tree if hasattr(stored, "tree") else stored
            names = _stored_names(names, stored)
            target = {
                name: np.zeros(leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, leaves, strict=True)
            }
            _check_leaves(path, target, stored)
            found = checkpointer.restore(state, target)
    except UserError:
        raise
    except Exception as error:  # damaged in whatever way
        raise UserError(
            f"{path}: this checkpoint cannot be read ({reason_of(error)}); resume from another"
        ) from None
    return jax.tree_util.tree_unflatten(structure, [found[name] for name in names])


# Before there was one state for all networks, leaves had these names. The first column is a pattern of today's.
_EARLIER_NAMES = (
    (r"trained\.(student|auxiliary)\.", r"\1."),
    (r"optimizer\.(student|auxiliary)\.", r"\1_optimizer."),
    (r"ema\.student\.", "ema."),
    (r"(trained|optimizer|ema)\.network\.", r"\1."),
)


def _stored_names(names: Sequence[str], stored: Mapping[str, Any]) -> list[str]:
    """The names of a state's leaves in a checkpoint: as they are, or as an earlier version had them."""
    earlier = list(names)
    for pattern, replacement in _EARLIER_NAMES:
        earlier = [re.sub(f"^{pattern}", replacement, name) for name in earlier]
    return earlier if not set(names) <= stored.keys() and set(earlier) <= stored.keys() else list(names)


def _check_leaves(path: Path, target: Mapping[str, np.ndarray], stored: Mapping[str, Any]) -> None:
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
    """A hash of named arrays, of their values in the order given."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, array: np.ndarray) -> None:
        self._digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        self._digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def value(self) -> str:
        return self._digest.hexdigest()
