"""Compiled programs on disk: where they are kept, and how broken ones are removed.

JAX stores a program as `NAME-HASH-cache`, and the time of its last use in `NAME-HASH-atime`. It never replaces or removes a
broken file: where a program was cut off, say by a full disk, it warns and compiles again in every run; where a time is
missing, it stores no further programs.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import re
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import jax
from filelock import FileLock, Timeout

PROGRAMS_BYTES = 8 * 10**9

_LOG = logging.getLogger("tsdsr_jax")
_ENTRY = re.compile(r".+[0-9a-f]{32}-cache")
_LOCK = ".lockfile"  # JAX's
_CHECKED = ".tsdsr_jax_checked"
_MONTH = 30 * 24 * 3600.0


def keep_programs(say: Callable[[str], object] = _LOG.warning) -> None:
    """Keeps compiled programs on disk, so that the next start does not compile them again.

    They are kept in ~/.cache/tsdsr_jax, up to 8 GB; if this cannot be written, in the folder for temporary files. JAX's own
    variables take precedence: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing. Programs that compile in less than 0.1 s, or JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, are not kept. Beside
    the programs, XLA keeps what it measured on a GPU to choose kernels: a changed program does not measure its unchanged
    parts again.

    Args:
      say: called with a line if the usual folder cannot be used as usual.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]  # JAX defines flags at run time
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default of 1 s would leave out half of what the small model compiles at its start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # JAX's default so far. The kernels themselves, its other cache, are in the programs already.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")
    named: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named is not None:
        if "://" not in named and (
            reason := _why_unusable(Path(named))
        ):  # JAX also knows places that are no folders
            say(f"JAX_COMPILATION_CACHE_DIR {named}: compiled programs cannot be kept there ({reason})")
            jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = usable_folder(say)
    if folder is None:
        return
    remove_broken(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", size_limit(folder, say))
    # If the disk fills up meanwhile, JAX warns about every program. The next start removes what is broken or says why not.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def usable_folder(say: Callable[[str], object]) -> Path | None:
    """The folder for this processor's programs; says so if it is not the usual one, or if there is none."""
    reasons = []
    for candidate in _candidates():
        folder = candidate / _processor()
        try:
            candidate.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True)
            _try(candidate, folder)
        except (OSError, RuntimeError) as error:
            reasons.append(f"{folder} ({getattr(error, 'strerror', None) or error})")
            continue
        if reasons:
            say(f"compiled programs cannot be kept in {reasons[0]}; keeping them in {folder}")
        return folder
    say(
        f"compiled programs cannot be kept, so every run compiles them again: {', '.join(reasons)}. "
        "JAX_COMPILATION_CACHE_DIR names another folder"
    )
    return None


def _why_unusable(folder: Path) -> str | None:
    """Why a folder, which is made if missing, cannot store files; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _candidates() -> Iterator[Path]:
    """The folders to try: the user's cache, and a temporary folder of the user's own."""
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsdsr_jax"
    yield Path(tempfile.gettempdir()) / f"tsdsr_jax-{os.getuid() if hasattr(os, 'getuid') else 'programs'}"


def _try(candidate: Path, folder: Path) -> None:
    """Raises OSError unless programs can be stored in the folder and, where others can write, only by this user."""
    if candidate.parent == Path(tempfile.gettempdir()) and hasattr(os, "getuid"):
        # Programs are code.
        found = candidate.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(1, "others can write there")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
    with suppress(Timeout), FileLock(folder / _LOCK, timeout=0):  # in use by another process, which is fine
        pass


def _processor() -> str:
    """A name for this kind of processor. A program compiled for one kind may crash another that shares the folder."""
    told = [platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    if _decompressor() is not zlib.decompress:  # an installation without it could not read these programs
        told.append("zstandard")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _decompressor() -> Callable[[bytes], bytes]:
    """What JAX decompresses programs with, chosen as JAX does."""
    with suppress(ImportError):
        zstd = importlib.import_module("compression.zstd")  # Python 3.14
        return cast(Callable[[bytes], bytes], zstd.decompress)
    with suppress(ImportError):
        zstandard = importlib.import_module("zstandard")
        return cast(Callable[[bytes], bytes], zstandard.ZstdDecompressor().decompress)
    return zlib.decompress


# --- broken entries -----------------------------------------------------------------------------------


def remove_broken(folder: Path) -> None:
    """Removes programs that JAX could not read, and gives those without a time one. Other files are left alone.

    Programs are read only if they look suspicious; all are once a month.
    """
    checked = folder / _CHECKED
    with suppress(OSError):
        due = not checked.exists() or time.time() - checked.stat().st_mtime > _MONTH
        suspicious = [entry for entry in _entries(folder) if due or _is_suspicious(entry)]
        wrong = [entry for entry in suspicious if not (_time_of(entry).exists() and _is_readable(entry))]
        if wrong:
            try:
                with FileLock(folder / _LOCK, timeout=0):
                    for entry in wrong:
                        _mend(entry)
            except Timeout:
                return  # another process stores programs; the next start tries again
        if due:
            checked.touch()


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _ENTRY.fullmatch(path.name) and path.is_file()]


def _time_of(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix("-cache") + "-atime")


def _is_suspicious(entry: Path) -> bool:
    """Whether a program was not stored completely, or changed since: JAX writes its time last, and at each use."""
    try:
        return entry.stat().st_mtime_ns > _time_of(entry).stat().st_mtime_ns
    except OSError:
        return True


def _is_readable(entry: Path) -> bool:
    """Whether JAX can decompress a program."""
    try:
        return len(_decompressor()(entry.read_bytes())) > 4
    except Exception:  # each library has its own
        return False


def _mend(entry: Path) -> None:
    """Removes a broken program or gives a whole one a time. Called with JAX's lock, so no process is just writing it."""
    with suppress(OSError):
        if _is_readable(entry):
            _time_of(entry).write_bytes(time.time_ns().to_bytes(8, "little"))
        else:
            entry.unlink()
            _time_of(entry).unlink(missing_ok=True)


def size_limit(folder: Path, say: Callable[[str], object]) -> int:
    """The limit to pass to JAX: -1, none, if another program's file would keep it from finding the oldest programs."""
    foreign = sorted(path.name for path in folder.glob("*-cache") if not _time_of(path).exists())
    if not foreign:
        return PROGRAMS_BYTES
    say(
        f"{folder / foreign[0]} is not a compiled program; while it is there, this folder's size is not limited"
    )
    return -1
