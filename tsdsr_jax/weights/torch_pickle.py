"""Reads and writes a single tensor in a `.pt` file of `torch.save`, without torch and without executing the file.

The file is a zip archive. `<root>/data.pkl` is a pickle that describes the tensor, `<root>/data/<key>` holds the bytes of
one storage, and `<root>/byteorder` says how they are ordered. A pickle may call any Python function by its name. So this
module resolves only the few names that describe a plain tensor, and resolves them to functions of its own. These return
plain descriptions, and the array is built from the description after it has been checked.

Source of the format: archives written by torch 2.13, examined with `zipfile` and `pickletools`.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.git_lfs import is_pointer, pointer_error

STORAGE_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# An expanded tensor stores few bytes but has many elements. The largest prompt embedding has 2.4 million.
MAX_ELEMENTS = 2**31

_ZIP_START = b"PK\x03\x04"
_OLD_FORMAT_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError)


# What the unpickler builds: tuples, because a pickle can change the attributes of most other objects.


class _StorageType(NamedTuple):
    name: str


class _Storage(NamedTuple):
    type_name: str
    key: str
    elements: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensor(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads the single tensor or Parameter that `torch.save` wrote to `path`.

    Args:
        path: a `.pt` file in torch's zip format (the default since torch 1.6), little-endian.

    Returns:
        A contiguous array that owns its memory, with the tensor's shape and dtype; bfloat16 becomes
        `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing, empty, damaged, big-endian or in torch's old format, holds anything but a
            single tensor, or its pickle names something that a tensor does not need.
    """
    path = Path(path)
    _check_start(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy or download it again.") from error


def _check_start(path: Path) -> None:
    """Raises UserError for a file that is not a zip archive; its first bytes tell why."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if start.startswith(_ZIP_START):
        return
    if not start:
        raise UserError(f"{path} is empty (0 bytes): copy or download it again.")
    if start.startswith(_OLD_FORMAT_START):
        raise UserError(
            f"{path} is in the format of torch before 1.6, which is not supported. Save it again where torch is"
            f" installed: t = torch.load({path.name!r}, weights_only=True); torch.save(t, {path.name!r})"
        )
    if is_pointer(start):
        raise pointer_error(path)
    raise UserError(
        f"{path} is not a file of torch.save (expected a zip archive): check that it is the right file."
    )


def _read_archive(archive: zipfile.ZipFile, path: Path) -> np.ndarray:
    roots = [name[: -len("data.pkl")] for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise UserError(
            f"{path} is a zip archive but not one of torch.save (it has no data.pkl): check the file."
        )
    root = roots[0]
    names = set(archive.namelist())
    if root + "byteorder" in names and archive.read(root + "byteorder").strip() != b"little":
        raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one.")
    view = _unpickle(archive.read(root + "data.pkl"), path)
    record = f"{root}data/{view.storage.key}"
    if record not in names:
        raise UserError(f"{path} is damaged: it has no record {record}. Copy or download it again.")
    return _build_array(view, archive.read(record), path)


def _unpickle(data: bytes, path: Path) -> _View:
    try:
        value = _TensorUnpickler(io.BytesIO(data), path).load()
    except UserError:
        raise
    except Exception as error:  # a malformed pickle can make the unpickler raise almost anything
        raise UserError(
            f"{path} is damaged: its pickle cannot be read ({error}). Copy or download it again."
        ) from error
    if isinstance(value, _View):
        return value
    kind = "dict" if isinstance(value, dict) else type(value).__name__.strip("_")
    raise UserError(
        f"{path} holds a {kind}, expected one tensor: save the tensor alone with torch.save(tensor, path)."
    )


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only the names in the pickle of a plain tensor."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global of the pickle, before the pickle can use it."""
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        rebuild = _REBUILD.get((module, name))
        if rebuild is None:
            raise UserError(
                f"{self._path} names {module}.{name}, which a plain tensor does not need. It may contain"
                " code and was not loaded: if you trust it, open it with torch and save only the tensor"
                " again."
            )
        # A new function each time, because a pickle may set attributes on it that must not outlive the file.
        return lambda *args: rebuild(*args)

    def persistent_load(self, pid: Any) -> _Storage:
        """Called for every storage: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _device, elements = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError(f"unexpected reference {pid!r}")
        return _Storage(storage_type.name, key, _natural(elements))


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    """Describes a tensor. `rest` is (requires_grad, hooks, metadata), of which only metadata affects the values."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    if len(rest) > 2 and rest[2]:
        raise ValueError(f"a tensor with metadata {rest[2]!r}")
    return _View(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _rebuild_parameter(tensor: Any, _requires_grad: Any, _hooks: Any) -> _View:
    if not isinstance(tensor, _View):
        raise ValueError("a Parameter without a tensor")
    return tensor


_REBUILD: dict[tuple[str, str], Callable[..., _View]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _build_array(view: _View, data: bytes, path: Path) -> np.ndarray:
    """Checks that the view lies inside its storage's bytes, and copies it out of them."""
    dtype = STORAGE_DTYPES[view.storage.type_name]
    if len(view.shape) != len(view.strides) or len(data) < view.storage.elements * dtype.itemsize:
        raise UserError(f"{path} is damaged: its storage has too few bytes. Copy or download it again.")
    elements = math.prod(view.shape)
    if elements > MAX_ELEMENTS:
        raise UserError(
            f"{path} claims a tensor of shape {view.shape}, too large to be an embedding: check the file."
        )
    if elements == 0:
        return np.zeros(view.shape, dtype)
    last = view.offset + sum(
        (side - 1) * stride for side, stride in zip(view.shape, view.strides, strict=True)
    )
    if last >= view.storage.elements:
        raise UserError(f"{path} is damaged: its tensor reaches past its storage. Copy or download it again.")
    flat = np.frombuffer(data, dtype, count=view.storage.elements)[view.offset :]
    byte_strides = [stride * dtype.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat, view.shape, byte_strides, writeable=False).copy(order="C")


def write_tensor(path: Path, array: np.ndarray) -> None:
    """Writes a tensor atomically as `torch.save` does, for `torch.load` and `read_tensor`, without torch.

    Args:
        path: the `.pt` file.
        array: of a dtype in `STORAGE_DTYPES`.

    Raises:
        UserError: the file cannot be written.
        ValueError: torch has no such dtype.
    """
    storage = next((name for name, dtype in STORAGE_DTYPES.items() if dtype == array.dtype), None)
    if storage is None:
        raise ValueError(f"{path}: a tensor cannot have dtype {array.dtype}")
    array = np.asarray(array, order="C")
    strides = [stride // array.itemsize for stride in array.strides]
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: str | bytes) -> None:
            # A fixed date, so that equal tensors give equal files.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)

        write("archive/data.pkl", _pickled_tensor(storage, array.size, array.shape, strides))
        write("archive/byteorder", "little")
        write("archive/data/0", array.astype(array.dtype.newbyteorder("<")).tobytes())
        write("archive/version", "3\n")


def _pickled_tensor(storage: str, elements: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """The pickle of a call that rebuilds a tensor from storage 0.

    It is assembled opcode by opcode, because Python's pickler would have to import torch for the names.
    """

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        size = (value.bit_length() + 8) // 8
        return pickle.LONG1 + bytes([size]) + value.to_bytes(size, "little", signed=True)

    def group(*parts: bytes) -> bytes:
        return pickle.MARK + b"".join(parts) + pickle.TUPLE

    reference = group(text("storage"), name("torch", storage), text("0"), text("cpu"), number(elements))
    no_hooks = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = group(
        reference + pickle.BINPERSID,
        number(0),
        group(*map(number, shape)),
        group(*map(number, strides)),
        pickle.NEWFALSE,
        no_hooks,
    )
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return pickle.PROTO + b"\x02" + rebuild + arguments + pickle.REDUCE + pickle.STOP
