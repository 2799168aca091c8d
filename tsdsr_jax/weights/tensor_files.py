"""Safetensors files, read lazily and written tensor by tensor, so that a checkpoint need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.git_lfs import refuse_pointer

_DTYPE_CODES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
# Bytes of a sample, and samples of a tensor, in a fingerprint.
SAMPLE, SAMPLES = 4096, 32
_CODES = {dtype: code for code, dtype in _DTYPE_CODES.items()}


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorStream(NamedTuple):
    """TensorStream that are made one at a time, while they are written.

    Attributes:
      specs: name -> shape and dtype, in the order of `make`.
      make: () -> (name, array) pairs.
    """

    specs: Mapping[str, TensorSpec]
    make: Callable[[], Iterable[tuple[str, np.ndarray]]]


class _Place(NamedTuple):
    """Where a tensor is: its file, also as an open descriptor, and its first byte there."""

    path: Path
    file: int
    start: int


def _bytes(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize


class TensorReader:
    """The tensors of one or several safetensors files.

    Attributes:
      source: the file, or the index of the shards; for messages.
      specs: name -> shape and dtype of every tensor.
      metadata: the first file's string metadata.
    """

    def __init__(self, source: Path, files: Iterable[Path]):
        """Opens all files and reads their headers.

        Raises:
          UserError: a file is missing, damaged, holds an unknown dtype, or two files hold the same tensor.
        """
        self.source = source
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, _Place] = {}
        for path in files:
            self._add(path)

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{self.source}: {path.name} is missing; download the checkpoint again")
        try:
            handle = safe_open(path, framework="np")
            file = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            refuse_pointer(path)
            reason = _other_kind(path) or f"not a readable safetensors file ({error}); it may be truncated"
            raise UserError(f"{path}: {reason}") from None
        weakref.finalize(self, os.close, file)
        starts = _data_starts(path)
        self.metadata = self.metadata or dict(handle.metadata() or {})
        for name in handle.keys():  # noqa: SIM118 (a safe_open is no mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPE_CODES:
                raise UserError(
                    f"{path}: {name} is {view.get_dtype()}; expected one of {', '.join(_DTYPE_CODES)}"
                )
            if name in self.specs:
                raise UserError(f"{path}: {name} is also in another shard of {self.source}")
            self.specs[name] = TensorSpec(tuple(view.get_shape()), _DTYPE_CODES[view.get_dtype()])
            self._places[name] = _Place(path, file, starts[name])

    def read(self, name: str) -> np.ndarray:
        """Reads the tensor in its stored dtype. Several threads may read at once.

        Raises:
          UserError: the file has become shorter since it was opened, or cannot be read.
        """
        return self._read(name, 0, self.specs[name].shape)

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """Reads one entry of the tensor's first axis."""
        shape = self.specs[name].shape[1:]
        return self._read(name, layer * _bytes(TensorSpec(shape, self.specs[name].dtype)), shape)

    def _read(self, name: str, skip: int, shape: tuple[int, ...]) -> np.ndarray:
        place, array = self._places[name], np.empty(shape, self.specs[name].dtype)
        rest, start = array.reshape(-1).view(np.uint8).data, place.start + skip
        while rest:
            try:
                count = os.preadv(place.file, [rest], start)  # Linux reads at most 2 GB at a time
            except OSError as error:
                raise UserError(f"{place.path}: cannot be read ({error})") from None
            if not count:
                raise UserError(f"{place.path}: ends within {name}; was it replaced while it was read?")
            rest, start = rest[count:], start + count
        return array

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes, and samples of every tensor's values, spread over the whole tensor."""
        digest = hashlib.sha256()
        for name, spec in sorted(self.specs.items()):
            digest.update(f"{name} {spec.shape} {spec.dtype.name};".encode())
            place, size = self._places[name], _bytes(spec)
            for start in sorted({(size - SAMPLE) * index // (SAMPLES - 1) for index in range(SAMPLES)}):
                digest.update(os.pread(place.file, min(SAMPLE, size), place.start + max(0, start)))
        return digest.hexdigest()

    def view(self, name: str) -> np.ndarray:
        """Maps the tensor from its file, read-only. To look at every value, this is several times as fast as `read`."""
        place, spec = self._places[name], self.specs[name]
        if 0 in spec.shape:
            return np.empty(spec.shape, spec.dtype)
        # One map per tensor, so that only one at a time counts as this process's memory.
        data = np.memmap(place.path, np.uint8, "r", place.start, (_bytes(spec),))
        return data.view(np.ndarray).view(spec.dtype).reshape(spec.shape)


def _other_kind(path: Path) -> str | None:
    """What a file is instead of safetensors, if its first bytes tell."""
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError:
        return None
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "is a web page, not a safetensors file; download the file itself (at the Hugging Face hub, its address has "
            "/resolve/ instead of /blob/)"
        )
    if start.startswith(b"pk\x03\x04"):
        return "is a PyTorch file, not a safetensors file; save its tensors with safetensors.torch.save_file"
    return None


def _data_starts(path: Path) -> dict[str, int]:
    """Where each tensor begins in a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def open_tensors(path: Path) -> TensorReader:
    """Opens a safetensors file, or the shards that a `*.index*.json` names."""
    if path.suffix != ".json":
        return TensorReader(path, [path])
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not an index of safetensors shards ({error!r})") from None
    return TensorReader(path, [path.parent / shard for shard in shards])


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Finds the weights file, or the index of shards, in a model's folder.

    Looks for `stem.safetensors` or an index, with the variant in the name if one is given. Without a given variant, the only
    variant in the folder is used.

    Raises:
      UserError: there are no weights, only pickled ones, or several variants to choose from.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a diffusers checkpoint has transformer/ and vae/ in it")
    names = {path.name for path in folder.iterdir()}

    def of_variant(infix: str) -> list[str]:
        return [f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"]

    for name in of_variant(f".{variant}" if variant else ""):
        if name in names:
            return folder / name
    variants = sorted(
        name.removeprefix(f"{stem}.")
        .removesuffix(".safetensors")
        .removeprefix("safetensors.index.")
        .removesuffix(".json")
        for name in names
        if name.startswith(f"{stem}.") and name.endswith((".safetensors", ".json")) and "-of-" not in name
        if name not in of_variant("")
    )
    if not variant and len(variants) == 1:
        return find_weights(folder, stem, variants[0])
    wanted = " or ".join(of_variant(f".{variant}" if variant else ""))
    if variants or (variant and names & set(of_variant(""))):
        choice = f"--variant {' or '.join(variants)}" if variants else "no --variant"
        raise UserError(f"{folder}: {wanted} not found; the files there need {choice}")
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in names):
        raise UserError(
            f"{folder}: only pickled weights here; expected {wanted} (pickles can run code and are not read)"
        )
    raise UserError(f"{folder}: {wanted} not found")


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file one tensor at a time; the file gets its name when it is complete.

    Args:
      path: the file; parent folders are created.
      specs: every tensor's shape and dtype, in the order in which `tensors` yields them.
      tensors: (name, array) pairs.
      metadata: string metadata for the header.

    Raises:
      UserError: the file cannot be written.
      ValueError: `tensors` does not yield what `specs` announces.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name, spec in specs.items():
        size = _bytes(spec)
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        expected = iter(specs.items())
        for name, array in tensors:
            if (name, TensorSpec(array.shape, array.dtype)) != next(expected, None):
                raise ValueError(f"{name} {array.dtype}{array.shape} is not the tensor announced next")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{missing[0]} was announced but not given")


def save_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors that are already in memory."""
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    write_tensors(path, specs, tensors.items(), metadata)
