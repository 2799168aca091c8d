"""Parameters from files to devices: read by several threads, merged with an adapter on the device, part by part.

An autoencoder is one part. A transformer's first part is what lies outside its blocks; then each block is one. A kernel goes
to the device as the file has it, in its dtype and, in a PyTorch checkpoint, transposed. The device does the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from tsdsr_jax.models.lora import merge_kernel, pair_of
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.weights.finite import is_finite
from tsdsr_jax.weights.sd3_folder import NetworkFiles
from tsdsr_jax.weights.tensor_files import TensorReader
from tsdsr_jax.weights.torch_names import THREADS, Entry, base_entries, to_tree

# Parts that are read while the device works on another one.
AHEAD = 2

Put = Callable[[np.ndarray], jax.Array]


class _Broken(Exception):
    """A tensor has a NaN or an infinity."""


class _Leaf(NamedTuple):
    """A parameter in its file.

    Attributes:
      path: in its part, such as `attn/to_q/kernel`.
      read: reads it; a kernel may be transposed.
      pair: a and b, on the host, if an adapter changes it.
      size: number of values.
    """

    path: str
    read: Callable[[], np.ndarray]
    pair: tuple[np.ndarray, np.ndarray] | None
    size: int


class _Part(NamedTuple):
    leaves: list[_Leaf]
    transposed: bool


def load_parts(
    files: NetworkFiles,
    put: Put,
    lora: Tree | None = None,
    lora_scale: float = 1.0,
    dtype: DTypeLike | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Tree]:
    """Yields a network's parameters part by part, with an adapter merged in float32.

    The next parts are being read meanwhile, so the device holds `AHEAD` more parts than the caller.

    Args:
      files: of a network.
      put: host array -> device array; called by several threads.
      lora: adapter to merge.
      lora_scale: factor on the adapter.
      dtype: of the result; None: the stored dtype, and float32 for kernels that the adapter changes.
      progress: called with the number of values in each part.

    Raises:
      UserError: the weights do not fit the config, or have NaNs or infinities. Values of a converted folder were checked
        when it was converted and are not checked again.
    """
    files.specs  # noqa: B018 (checks names and shapes)
    pairs = flatten_dict(lora or {}, sep="/")
    parts = _parts(files, pairs)
    load = partial(_load_leaf, put=put, check=not files.is_converted)
    try:
        for part, loaded in zip(parts, _read_ahead([part.leaves for part in parts], load), strict=True):
            leaves = {path: leaf for path, (leaf, _) in loaded.items()}
            adapted = {path: pair for path, (_, pair) in loaded.items() if pair}
            if part.transposed or adapted or dtype is not None:
                leaves = _assembled(
                    leaves, adapted, factor=lora_scale, transposed=part.transposed, dtype=dtype
                )
            progress(sum(leaf.size for leaf in part.leaves))
            yield to_tree(leaves.items())
    except _Broken:
        files.check_finite()
        raise AssertionError("a value that was not finite has become finite") from None


def load_tensors(
    reader: TensorReader, put: Put, progress: Callable[[int], object] = lambda size: None
) -> Tree:
    """Loads a file whose tensors are named by their paths in a parameter tree, in the stored dtypes."""
    parts = [
        [
            _Leaf(name, partial(reader.read, name), None, int(np.prod(reader.specs[name].shape)))
            for name in names
        ]
        for _, names in groupby(reader.specs, key=lambda name: name.split("/")[0])
    ]
    loaded: dict[str, jax.Array] = {}
    for part, leaves in zip(
        parts, _read_ahead(parts, partial(_load_leaf, put=put, check=False)), strict=True
    ):
        # Without waiting, the copies on the host would pile up.
        loaded |= {path: jax.block_until_ready(leaf) for path, (leaf, _) in leaves.items()}
        progress(sum(leaf.size for leaf in part))
    return to_tree(loaded.items())


def _parts(files: NetworkFiles, pairs: Mapping[str, Any]) -> list[_Part]:
    entries = base_entries(files.config)
    ends = _Part([_whole(files, entry, pairs) for entry in entries if not entry.stacked], False)
    if not isinstance(files.config, MMDiTConfig):
        return [ends]
    parts = [ends]
    for run, (_, length, _) in enumerate(files.config.runs()):
        members = [entry for entry in entries if entry.path.startswith(f"blocks_{run}/")]
        parts += [
            _Part([_layer(files, entry, index, pairs) for entry in members], not files.is_converted)
            for index in range(length)
        ]
    return parts


def _whole(files: NetworkFiles, entry: Entry, pairs: Mapping[str, Any]) -> _Leaf:
    """A leaf outside the blocks, in our layout."""
    reader = files.reader
    if files.is_converted:
        read = partial(reader.read, entry.path)
    else:
        read = partial(entry.gather, reader.read, entry.stored_dtype(reader.specs))
    return _Leaf(entry.path, read, pair_of(pairs, entry.path), int(np.prod(entry.shape)))


def _layer(files: NetworkFiles, entry: Entry, index: int, pairs: Mapping[str, Any]) -> _Leaf:
    """One layer of a stacked leaf, as stored."""
    path = entry.path.split("/", 1)[1]
    if files.is_converted:
        read = partial(files.reader.read_layer, entry.path, index)
    else:
        read = partial(files.reader.read, entry.names[index])
    pair = pair_of(pairs, entry.path)
    layer = None if pair is None else (pair[0][index], pair[1][index])
    return _Leaf(path, read, layer, int(np.prod(entry.shape[1:])))


def _load_leaf(leaf: _Leaf, put: Put, check: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Reads a leaf onto the device, with its pair."""
    array = leaf.read()
    if check and not is_finite(array):
        raise _Broken(leaf.path)
    return put(array), None if leaf.pair is None else (put(leaf.pair[0]), put(leaf.pair[1]))


def _read_ahead(parts: Sequence[Sequence[_Leaf]], load: Callable[[_Leaf], Any]) -> Iterator[dict[str, Any]]:
    """Yields {path: loaded} of each part in order, while threads load the next parts."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting: deque[dict[str, Future[Any]]] = deque()
        for part in parts:
            waiting.append({leaf.path: pool.submit(load, leaf) for leaf in part})
            if len(waiting) > AHEAD:
                yield _results(waiting.popleft())
        while waiting:
            yield _results(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _results(futures: dict[str, Future[Any]]) -> dict[str, Any]:
    return {path: future.result() for path, future in futures.items()}


@partial(jax.jit, static_argnames=("factor", "transposed", "dtype"))
def _assembled(
    leaves: dict[str, jax.Array],
    pairs: dict[str, tuple[jax.Array, jax.Array]],
    *,
    factor: float,
    transposed: bool,
    dtype: DTypeLike | None,
) -> dict[str, jax.Array]:
    """Transposes kernels, merges pairs into them in float32, and casts everything to `dtype`, if one is given."""
    made = {}
    for path, leaf in leaves.items():
        if transposed and leaf.ndim == 2:
            leaf = leaf.T
        if path in pairs:
            leaf = merge_kernel(leaf, *pairs[path], factor, jnp.float32)
        made[path] = leaf if dtype is None else leaf.astype(dtype)
    return made
