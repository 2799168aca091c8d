"""Which devices a script computes on, and in what precision."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.errors import UserError

_PLATFORMS = {"cuda": "cuda", "gpu": "cuda", "cpu": "cpu", "tpu": "tpu"}
_INSTALL = {
    "cuda": "a GPU needs `pip install 'tsdsr_jax[cuda12]'`",
    "tpu": "a TPU needs `pip install 'tsdsr_jax[tpu]'`",
}

DTYPES = {"fp16": jnp.float16, "bf16": jnp.bfloat16, "fp32": jnp.float32}


def select_devices(name: str | None) -> list[jax.Device]:
    """The local devices a `--device` flag means: None (all of the best kind), "cuda", "cuda:1", "cpu", "tpu".

    Raises:
      UserError: the name is none of these, or there is no such device.
    """
    if name is None:
        return jax.local_devices()
    match = re.fullmatch(r"(cuda|gpu|cpu|tpu)(?::(\d+))?", name)
    if match is None:
        raise UserError(f"--device {name}: expected cuda, cuda:N, cpu or tpu")
    platform, index = _PLATFORMS[match[1]], match[2]
    if platform == "cpu":
        # Before any other backend wakes up and reserves its memory.
        jax.config.update("jax_platforms", "cpu")
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:
        found = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        hint = _INSTALL.get(platform, "")
        raise UserError(f"--device {name}: JAX sees no such device, only {found}; {hint}") from None
    if index is None:
        return devices
    if int(index) >= len(devices):
        raise UserError(f"--device {name}: there are {len(devices)}, numbered from 0")
    return [devices[int(index)]]


def select_dtype(name: str | None, devices: list[jax.Device]) -> DTypeLike:
    """The computation dtype of a `--mixed_precision` flag; None: fp16 on a GPU, bf16 on a TPU, fp32 on a CPU."""
    default = {"gpu": "fp16", "tpu": "bf16"}.get(devices[0].platform, "fp32")
    return DTYPES[name or default]
