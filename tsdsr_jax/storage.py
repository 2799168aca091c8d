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
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from tsdsr_jax import peers
from tsdsr_jax.errors import UserError

# Scheme -> the extra that installs what it needs.
SERVED = {"s3": "s3", "gs": "gcs", "az": "azure", "hf": None}
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_CHECKPOINT = re.compile(r"checkpoint_\d+")
_LAST = "_CHECKPOINT_METADATA"
# Files that say that others are complete.
_FINAL = (_LAST, "manifest.json")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
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


# What tells two versions of an object apart, as the stores' packages call it.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "content_md5", "blob_id", "xet_hash", "generation", "mtime", "LastModified", "last_modified",
)  # fmt: skip
_TIMES = ("LastModified", "last_modified", "updated", "mtime")


class _Object(NamedTuple):
    """A file in a store.

    Attributes:
      size: in bytes.
      version: differs between versions; "" if the store tells nothing of that kind.
      modified: seconds since 1970; None if unknown.
    """

    size: int | None
    version: str
    modified: float | None


def _listing(place: _Place) -> dict[str, _Object]:
    """Name below the place -> file. A single file has the empty name; names that end in a slash only stand for folders.

    Raises:
      UserError: a name leads out of the folder.
    """
    place.system.invalidate_cache()
    root, names = place.path.rstrip("/"), {}
    for path, facts in place.system.find(place.path, detail=True).items():
        name = path[len(root) :].lstrip("/")
        if path.endswith("/"):
            continue
        if ".." in name.split("/"):
            raise UserError(f"{place.url}: holds {path}, whose name leads out of the folder")
        version = next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
        names[name] = _Object(
            facts.get("size"), version, _seconds(next((facts[k] for k in _TIMES if facts.get(k)), None))
        )
    return names


def _seconds(when: Any) -> float | None:
    """A time as seconds since 1970: from a number, a `datetime`, or ISO 8601."""
    with suppress(ValueError, TypeError, AttributeError):
        if isinstance(when, int | float):
            return float(when)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        return float(when.timestamp())
    return None


def _cache() -> Path:
    """The folder for copies; in the folder for temporary files if the usual one cannot be written."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tsdsr_jax" / "storage"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual.resolve()
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


def fetched(url: str, flag: str, without: Sequence[str] = ()) -> Path:
    """Copies a file or folder to this machine, as far as it is not there already, and returns where it is.

    Several processes may ask for the same one; one copies, the others wait.

    Args:
      url: what to copy.
      flag: the flag that names it.
      without: URLs of output folders. What lies below them is left out, because results are no input.

    Raises:
      UserError: there is nothing, it cannot be read, or it is an output folder or an incomplete checkpoint.
    """
    place = _open(url, flag)
    own = url.rstrip("/")
    if own in (output.rstrip("/") for output in without):
        raise UserError(f"{flag} {url}: is also the output folder; results would mix with what is read")
    results = [output.rstrip("/")[len(own) + 1 :] for output in without if output.startswith(f"{own}/")]
    folder = _cache() / "copies" / _short(" ".join([own, *results]))
    folder.mkdir(parents=True, exist_ok=True)
    target, notes = folder / _base(url), folder / "versions.json"
    with FileLock(folder / "lock"):
        try:
            there = _listing(place)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{flag} {url}: {reason_of_store(error)}") from None
        there = {
            name: each
            for name, each in there.items()
            if not any(name.startswith(f"{result}/") for result in results)
        }
        if not there:
            raise UserError(f"{flag} {url}: no such file or folder")
        if _CHECKPOINT.fullmatch(_base(url)) and _LAST not in there:
            raise UserError(f"{flag} {url}: this checkpoint is incomplete in the store; use an earlier one")
        here = {name: _Object(*facts) for name, facts in _read(notes).items()}
        for name in here.keys() - there.keys():
            _remove(target / name)
        known = {name: each for name, each in there.items()
                 if each.version and here.get(name) == each and (target / name).is_file()}  # fmt: skip
        wanted = {name: each for name, each in there.items() if name not in known}
        # Noted first: an interruption must not leave a new file under an old version.
        notes.write_text(json.dumps(known))
        try:
            for name in _get(place, target, wanted, flag):
                known[name] = there[name]
        finally:
            notes.write_text(json.dumps(known))
    _given[target] = own
    return target


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _get(place: _Place, target: Path, wanted: Mapping[str, _Object], flag: str) -> Iterator[str]:
    """Copies files from a store, each completely or not at all, with the time that they have there; yields their names."""
    from tqdm import tqdm

    try:
        for name, facts in tqdm(
            wanted.items(), desc=f"copying {_base(place.url)}", unit=" files", leave=False, disable=None
        ):
            local = target / name if name else target
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.with_name(f".{_short(local.name)}.part")
            place.system.get_file(f"{place.path}/{name}".rstrip("/"), str(part))
            if facts.modified is not None:
                os.utime(part, (facts.modified, facts.modified))
            if local.is_dir():
                shutil.rmtree(local)
            os.replace(part, local)
            yield name
    except OSError as error:
        if error.filename and str(error.filename).startswith(str(target)):
            raise UserError(f"{flag} {place.url}: cannot be copied to {target} ({error.strerror})") from None
        raise UserError(f"{flag} {place.url}: {reason_of_store(error)}") from None
    except UserError:
        raise
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
      local: the copy. It begins with what is in the store; of the checkpoints, only with the latest and a `wanted` one.

    Raises:
      UserError: the folder cannot be read or written.
    """

    def __init__(self, url: str, flag: str, say: Callable[[str], object], wanted: str | None = None):
        self.url, self._say = url.rstrip("/"), say
        if Path(self.url).suffix.lower() in _PICTURES:
            raise UserError(f"{flag} {url}: names a file; in a store, give the folder for results")
        self._place = _open(self.url, flag)
        outputs = _cache() / "outputs"
        outputs.mkdir(parents=True, exist_ok=True)
        self._top = Path(tempfile.mkdtemp(prefix=f"{_short(url)}-", dir=outputs))
        self.local = self._top / _base(self.url)
        self.local.mkdir()
        self.failed: str | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._there = self._pull(flag, wanted)
        self._sent = self._files()
        self._check(flag)
        self._thread = threading.Thread(
            target=self._watch, name=f"brings {_base(url)} to its store", daemon=True
        )
        self._thread.start()

    def _pull(self, flag: str, wanted: str | None) -> set[str]:
        """Copies what the store has, and returns the names of its checkpoints' files."""
        try:
            there = _listing(self._place)
        except FileNotFoundError:
            there = {}
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{flag} {self.url}: {reason_of_store(error)}") from None
        complete = {of for name in there if (of := _checkpoint_of(name)) and name == f"{of}/{_LAST}"}
        chosen = {None, max(complete, key=_step, default=None), wanted if wanted in complete else None}
        files = {name: each for name, each in there.items() if name and _checkpoint_of(name) in chosen}
        list(_get(self._place, self.local, files, flag))
        return {name for name in there if _checkpoint_of(name)}

    def _check(self, flag: str) -> None:
        """Tries to write, so that what cannot be saved is not computed."""
        try:
            probe = f"{self._place.path}/.tsdsr-{self._top.name}"
            self._place.system.pipe_file(probe, b"tsdsr_jax looks whether it can write here")
            self._place.system.rm_file(probe)
        except Exception as error:
            shutil.rmtree(self._top, ignore_errors=True)
            raise UserError(f"{flag} {self.url}: cannot be written: {reason_of_store(error)}") from None

    def _files(self) -> dict[str, tuple[int, int]]:
        """Name -> size and time of every file that is complete.

        Raises:
          OSError: the copy cannot be read, or is gone.
        """

        def unreadable(error: OSError) -> None:
            if Path(error.filename) == self.local or os.path.exists(error.filename):
                raise error

        found = {}
        for folder, below, names in os.walk(self.local, onerror=unreadable):
            below[:] = [name for name in below if _UNFINISHED not in name]
            for name in names:
                path = Path(folder) / name
                with suppress(FileNotFoundError):  # removed meanwhile
                    status = path.stat()
                    if not name.endswith(".part"):
                        found[path.relative_to(self.local).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found

    def push(self) -> None:
        """Brings what is new to the store, and removes checkpoints that the run has removed.

        What can be brought is, whatever happens to the rest.

        Raises:
          Exception: the first error.
        """
        with self._lock:
            here, errors, torn = self._files(), list[Exception](), set[str | None]()
            new = [name for name, facts in here.items() if self._sent.get(name) != facts]
            for name in sorted(new, key=lambda name: (name.endswith(_FINAL), name)):
                if name.endswith(_LAST) and _checkpoint_of(name) in torn:
                    continue
                try:
                    _put(self._place, self.local / name, name)
                    self._sent[name] = here[name]
                except Exception as error:
                    if (self.local / name).exists():  # otherwise it was removed meanwhile
                        errors.append(error)
                        torn.add(_checkpoint_of(name))
            if not errors:
                self._prune(here)
        if errors:
            raise errors[0]

    def _prune(self, here: Mapping[str, tuple[int, int]]) -> None:
        """Removes checkpoints that the run has removed, and those before them; never the last one."""
        kept = {of for name in here if (of := _checkpoint_of(name)) and f"{of}/{_LAST}" in here}
        removed = {of for name in self._sent if (of := _checkpoint_of(name)) and of not in kept}
        if not kept or not removed:
            return
        oldest = min(map(_step, kept))
        gone = [name for name in {*self._sent, *self._there}
                if (of := _checkpoint_of(name)) and of not in kept and _step(of) < oldest]  # fmt: skip
        for name in sorted(gone, key=lambda name: (not name.endswith(_LAST), name)):
            with suppress(FileNotFoundError):
                self._place.system.rm_file(f"{self._place.path}/{name}")
            self._sent.pop(name, None)
            self._there.discard(name)

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
          UserError: something could not be brought there, or Ctrl-C was pressed; the message says where it is.
        """
        self._ended.set()
        try:
            self._thread.join()
            self.push()
        except (Exception, KeyboardInterrupt) as error:
            _given.pop(self.local, None)  # the message names the copy itself
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason_of_store(error)
            raise UserError(
                f"{self.url}: {reason}; all results are in {self.local}, copy them from there"
            ) from None
        shutil.rmtree(self._top, ignore_errors=True)


def _checkpoint_of(name: str) -> str | None:
    first = name.split("/")[0]
    return first if _CHECKPOINT.fullmatch(first) and "/" in name else None


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("_")[2])


def _put(place: _Place, file: Path, name: str) -> None:
    place.system.put_file(str(file), f"{place.path}/{name}")


# --- this command's -------------------------------------------------------------------------------

# Copy -> the URL that was given for it.
_given: dict[Path, str] = {}
_outputs: list[OutputFolder] = []


def output_folder(
    url: str, flag: str, say: Callable[[str], object] = print, wanted: str | None = None
) -> Path:
    """Opens an output folder in a store and returns its local copy; `finish_all` must be called in the end."""
    folder = OutputFolder(url, flag, say, wanted)
    _outputs.append(folder)
    _given[folder.local] = folder.url
    return folder.local


def _push_all() -> None:
    for output in _outputs:
        with suppress(Exception):
            output.push()


# A checkpoint that is complete here counts, also where another process ends this one.
peers.before_giving_up(_push_all)


def below_output(url: str) -> Path | None:
    """Where something in this command's output folder is, in its local copy."""
    for output in _outputs:
        if url.startswith(f"{output.url}/"):
            return output.local / url.rstrip("/")[len(output.url) + 1 :]
    return None


def finish_all() -> None:
    """Brings everything to the stores, at the end of a command. Raises UserError like `OutputFolder.finish`."""
    if _outputs:
        with suppress(ValueError):  # outside the main thread
            # Training's own handlers would only note a signal.
            signal.signal(signal.SIGINT, signal.default_int_handler)
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
