"""An H200 that is only described: XLA compiles for it on a CPU, and nothing runs.

For this XLA needs JAX's CUDA plugin (`make cuda-compiler`), but neither CUDA's libraries nor a GPU. Import this module
before JAX. Kernels are not tuned, because that needs a GPU to try them on.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["XLA_FLAGS"] = ""  # such as the tests' many CPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMPILER = Path(sys.prefix) / f"cuda-compiler-{version('jax')}"
if COMPILER.is_dir():
    sys.path.append(str(COMPILER))

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tsdsr_jax.training.sharding import make_mesh

DESCRIPTION = Path(__file__).with_name("h200.txtpb")
CUDNN = 91000  # the version in the description
# Without a GPU there is nothing to tune on. LLVM need not optimize code that never runs.
OPTIONS: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 0}


def describe(count: int = 1) -> list[jax.Device]:
    """Returns this many described GPUs of one machine.

    Raises:
      SystemExit: the CUDA plugin is not installed.
    """
    try:
        target = topologies.get_topology_desc(
            platform="cuda", target_config=DESCRIPTION.read_text(), topology=f"1x1x{count}"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(
            f"XLA cannot compile for a GPU here ({reason}); run `make cuda-compiler` first"
        ) from None
    return list(target.devices)


def pretend(devices: list[jax.Device]) -> None:
    """Tells JAX and the project that these devices are there."""
    from tsdsr_jax.models import attention

    fused_attention_stablehlo.check_cudnn_version = lambda *_, **__: CUDNN
    fused_attention_stablehlo.check_compute_capability = lambda *_, **__: True
    jax.default_backend = lambda: "gpu"
    jax.devices = lambda *_: devices
    attention._has_flash_attention = lambda: True


def everywhere(devices: list[jax.Device], fsdp: int = 1) -> NamedSharding:
    """The sharding of an array that every device holds, on the mesh of training."""
    return NamedSharding(make_mesh(devices, fsdp=fsdp), PartitionSpec())


def placed(tree: Any, sharding: NamedSharding, dtype: Any = None) -> Any:
    """The shapes of a tree, on described devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype or leaf.dtype), sharding=sharding), tree
    )
