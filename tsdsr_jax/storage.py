"""Folders in object stores: `gs://`, `s3://`, `az://` and `hf://`, wherever a flag takes a path.

Whatever is read is copied to this machine's cache first; copies that are still those of the store are used again. An
output folder has a local copy, too: the command works there, and a thread brings what is new to the store. fsspec and its
packages (s3fs, gcsfs, adlfs, huggingface_hub) speak to the stores.

A checkpoint in a store is complete or does not count: its `_CHECKPOINT_METADATA` comes last and goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from tsdsr_jax.errors import UserError

# Scheme -> the extra that installs what it needs.
SERVED = {"s3": "s3", "gs": "gcs", "az": "azure", "hf": None}
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_CHECKPOINT = re.compile(r"checkpoint_\d+")
_LAST = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
# Seconds between two looks for something new in an output folder.
_INTERVAL = 20.0


def is_url(value: str) -> bool:
    return _URL.match(value) is not None


class _Place(NamedTuple):
    """A folder or file in a store."""

    url: str
    system: Any
    path: str


def _open(url: str, flag: str) -> _Place:
    """Connects to a store.

    Raises:
      UserError: the scheme is not served, or its package is not installed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SERVED:
        known = ", ".join(f"{name}://" for name in SERVED)
        raise UserError(
            f"{flag} {url}: {scheme}:// is not served; expected a path on this machine, or {known}"
        )
    try:
        import fsspec  # here, because few commands need it

        return _Place(url, *fsspec.core.url_to_fs(url))
    except ImportError:
        extra = f"pip install 'tsdsr_jax[{SERVED[scheme]}]'"
        raise UserError(f"{flag} {url}: {scheme}:// needs a package that is not installed: {extra}") from None
    except Exception as error:  # whatever the store's package raises
        raise UserError(f"{flag} {url}: {reason_of_store(error)}") from None


def reason_of_store(error: BaseException) -> str:
    """The first line of what a store's package says."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"no access ({text.splitlines()[0][:200]}); are the credentials set?"
    return f"cannot be reached ({text.splitlines()[0][:200]})"


def _listing(place: _Place) -> dict[str, list[Any]]:
    """Name below the place -> what tells its versions apart. A single file has the empty name."""
    place.system.invalidate_cache()
    found = place.system.find(place.path, detail=True)
    root = place.path.rstrip("/")
    names = {}
    for path, facts in found.items():
        name = path[len(root) :].lstrip("/")
        version = next((str(facts[key]) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
                        if facts.get(key)), "")  # fmt: skip
        if not name.endswith("/"):
            names[name] = [facts.get("size"), version]
    return names


def _cache() -> Path:
    """The folder for copies; in the folder for temporary files if the usual one cannot be written."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tsdsr_jax" / "storage"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    except OSError:
        pass
    other = Path(tempfile.gettempdir()) / f"tsdsr_jax-storage-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    return other


def _short(url: str) -> str:
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]


def _base(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


# --- reading --------------------------------------------------------------------------------------


def fetched(url: str, flag: str) -> Path:
    """Copies a file or folder to this machine, as far as it is not there already, and returns where it is.

    Several processes may ask for the same one; one copies, the others wait.

    Raises:
      UserError: there is nothing, or it cannot be read.
    """
    place = _open(url, flag)
    folder = _cache() / "copies" / _short(url)
    folder.mkdir(parents=True, exist_ok=True)
    target, notes = folder / _base(url), folder / "versions.json"
    with FileLock(folder / "lock"):
        try:
            there = _listing(place)
        except Exception as error:
            raise UserError(f"{flag} {url}: {reason_of_store(error)}") from None
        if not there:
            raise UserError(f"{flag} {url}: no such file or folder")
        here = _read(notes)
        for name in here.keys() - there.keys():
            _remove(target / name)
        wanted = [name for name in there if here.get(name) != there[name] or not (target / name).exists()]
        _get(place, target, wanted, flag)
        notes.write_text(json.dumps(there))
    _given[target] = url
    return target


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _get(place: _Place, target: Path, names: Iterable[str], flag: str) -> None:
    """Copies files from a store, each completely or not at all."""
    from tqdm import tqdm

    try:
        for name in tqdm(
            list(names), desc=f"copying {_base(place.url)}", unit=" files", leave=False, disable=None
        ):
            local = target / name if name else target
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.with_name(f".{_short(local.name)}.part")
            place.system.get_file(f"{place.path}/{name}".rstrip("/"), str(part))
            os.replace(part, local)
    except OSError as error:
        if error.filename and str(error.filename).startswith(str(target)):
            raise UserError(f"{flag} {place.url}: cannot be copied to {target} ({error.strerror})") from None
        raise UserError(f"{flag} {place.url}: {reason_of_store(error)}") from None
    except Exception as error:
        raise UserError(f"{flag} {place.url}: {reason_of_store(error)}") from None


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- writing --------------------------------------------------------------------------------------


class OutputFolder:
    """An output folder in a store, and its local copy.

    Attributes:
      url: the folder in the store.
      local: the copy. It begins with what is in the store; of the checkpoints, only with the latest.
    """

    def __init__(self, url: str, flag: str, say: Callable[[str], object]):
        self.url, self._say = url.rstrip("/"), say
        self._place = _open(self.url, flag)
        self._top = _cache() / "outputs" / f"{_short(url)}-{os.getpid()}"
        self.local = self._top / _base(self.url)
        shutil.rmtree(self._top, ignore_errors=True)
        self.local.mkdir(parents=True)
        self.failed: str | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._pull(flag)
        self._sent = self._files()
        self._thread = threading.Thread(
            target=self._watch, name=f"brings {_base(url)} to its store", daemon=True
        )
        self._thread.start()

    def _pull(self, flag: str) -> None:
        try:
            there = _listing(self._place)
        except FileNotFoundError:
            there = {}
        except Exception as error:
            raise UserError(f"{flag} {self.url}: {reason_of_store(error)}") from None
        complete = sorted(
            name.split("/")[0] for name in there if name.endswith(f"/{_LAST}") and name.count("/") == 1
        )
        latest = complete[-1] if complete else None
        wanted = [name for name in there if name and _checkpoint_of(name) in (None, latest)]
        _get(self._place, self.local, wanted, flag)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Name -> size and time of every file that is complete."""
        found = {}
        for folder, below, names in os.walk(self.local):
            below[:] = [name for name in below if _UNFINISHED not in name]
            for name in names:
                path = Path(folder) / name
                with suppress(OSError):  # removed meanwhile
                    status = path.stat()
                    if not name.endswith(".part"):
                        found[path.relative_to(self.local).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found

    def push(self) -> None:
        """Brings what is new to the store, and removes checkpoints that the run has removed."""
        with self._lock:
            here = self._files()
            new = [name for name, facts in here.items() if self._sent.get(name) != facts]
            for name in sorted(new, key=lambda name: (name.endswith(_LAST), name)):
                try:
                    _put(self._place, self.local / name, name)
                except FileNotFoundError:
                    if (self.local / name).exists():
                        raise
                    continue  # removed meanwhile
                self._sent[name] = here[name]
            gone = [name for name in self._sent if name not in here and _checkpoint_of(name)]
            for name in sorted(gone, key=lambda name: (not name.endswith(_LAST), name)):
                with suppress(FileNotFoundError):
                    self._place.system.rm_file(f"{self._place.path}/{name}")
                del self._sent[name]

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            try:
                self.push()
                self.failed = None
            except Exception as error:  # whatever the store's package raises; the next look tries again
                if self.failed is None:
                    self._say(f"{self.url}: {reason_of_store(error)}; trying again every {_INTERVAL:.0f} s")
                self.failed = reason_of_store(error)

    def finish(self) -> None:
        """Brings the rest to the store and removes the local copy.

        Raises:
          UserError: something could not be brought there; the message says where it is.
        """
        self._ended.set()
        self._thread.join()
        try:
            self.push()
        except Exception as error:
            raise UserError(
                f"{self.url}: {reason_of_store(error)}; the results are in {self.local}, copy them from there"
            ) from None
        shutil.rmtree(self._top, ignore_errors=True)


def _put(place: _Place, file: Path, name: str) -> None:
    place.system.put_file(str(file), f"{place.path}/{name}")


def _checkpoint_of(name: str) -> str | None:
    first = name.split("/")[0]
    return first if _CHECKPOINT.fullmatch(first) and "/" in name else None


# --- this command's -------------------------------------------------------------------------------

# Copy -> the URL that was given for it.
_given: dict[Path, str] = {}
_outputs: list[OutputFolder] = []


def output_folder(url: str, flag: str, say: Callable[[str], object] = print) -> Path:
    """Opens an output folder in a store and returns its local copy; `finish_all` must be called in the end."""
    folder = OutputFolder(url, flag, say)
    _outputs.append(folder)
    _given[folder.local] = folder.url
    return folder.local


def finish_all() -> None:
    """Brings everything to the stores, at the end of a command. Raises UserError like `OutputFolder.finish`."""
    while _outputs:
        _outputs.pop().finish()


def is_copy(folder: Path) -> bool:
    """Whether an output folder is the local copy of one in a store."""
    return any(output.local == folder for output in _outputs)


def as_given(text: str) -> str:
    """Replaces the paths of copies in a message by what the user has typed."""
    for local, url in _given.items():
        text = text.replace(str(local), url)
    return text


class _Translated:
    """A stream that writes URLs where a text has the paths of their copies."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> Any:
        return self._stream.write(as_given(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def urls_in_output() -> Iterator[None]:
    """Lets everything that is printed, commands to run next among it, name stores and not their copies on this machine."""
    with redirect_stdout(_Translated(sys.stdout)), redirect_stderr(_Translated(sys.stderr)):
        yield
