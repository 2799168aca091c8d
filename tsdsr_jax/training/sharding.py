"""How arrays are placed when many devices train together.

The mesh has two axes, `data` and `fsdp`. Batches are split over both. Adapters and their optimizer states are small: every
device holds a copy. Whole networks are copied, too, or split over `fsdp`; each device then gathers a layer's weights when
it needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsdsr_jax.models.layers import Placement

BATCH_AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """Builds a (data, fsdp) mesh over the devices (default: all of all processes); `fsdp` of them share one base.

    Raises:
      ValueError: the number of devices is not a multiple of `fsdp`.
    """
    devices = list(devices or jax.devices())
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"{len(devices)} devices cannot be split into groups of {fsdp}")
    return Mesh(np.asarray(devices).reshape(-1, fsdp), BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits the given axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a host array, identical in every process, on the devices of all processes as one array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placement(mesh: Mesh) -> Placement:
    """Returns the placement with which the networks run under `base_shardings`."""
    return Placement(activations=batch_sharding(mesh), weights=replicated(mesh))


def base_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Chooses a sharding for each parameter: its largest evenly divisible axis is split over `fsdp`.

    Stacked layers keep their leading axis whole, because the scan iterates over it. Vectors, one two-thousandth of SD3,
    stay whole on every device: gathering them would cost more than it saves.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`, structured like parameters.
    """
    parts = mesh.shape["fsdp"]

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = int(any(str(getattr(key, "key", "")).startswith("blocks_") for key in path))
        axes = [axis for axis in range(stacked, len(leaf.shape)) if leaf.shape[axis] % parts == 0]
        if parts == 1 or not axes or len(leaf.shape) - stacked < 2:
            return replicated(mesh)
        widest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * widest, "fsdp"))

    return jax.tree_util.tree_map_with_path(choose, shapes)
