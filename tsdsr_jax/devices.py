"""The devices that a command computes on, and its precision."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src import distributed  # the key-value store has no public name
from jax.typing import DTypeLike

from tsdsr_jax import launchers, peers
from tsdsr_jax.errors import UserError
from tsdsr_jax.program_cache import keep_programs

# Seconds; of the last save, and of bringing it to a store.
_SHUTDOWN = 3600
# Seconds by which JAX waits longer than we do for processes to join: it would abort with a trace of calls in C++.
_JAX_LATER = 60
_PLATFORMS = {"cuda": "cuda", "gpu": "cuda", "cpu": "cpu", "tpu": "tpu"}
_INSTALL = {
    "cuda": "a GPU needs `pip install 'tsdsr_jax[cuda12]'`",
    "tpu": "a TPU needs `pip install 'tsdsr_jax[tpu]'`",
}

# How XLA compiles for GPUs. cuBLASLt's products add biases, GELU and residuals themselves; Triton's leave them to other
# kernels. And products of the same input are not merged into one, because XLA would copy their weights side by side.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

DTYPES = {"fp16": jnp.float16, "bf16": jnp.bfloat16, "fp32": jnp.float32}


def select_devices(name: str | None) -> list[jax.Device]:
    """The local devices that `--device` names: None (all of the best kind), "cuda", "cuda:1", "cpu" or "tpu".

    It also starts to keep compiled programs on disk; see `keep_programs`.

    Raises:
      UserError: the name is none of these, or there is no such device.
    """
    keep_programs()
    if name is None:
        return jax.local_devices()
    match = re.fullmatch(r"(cuda|gpu|cpu|tpu)(?::(\d+))?", name)
    if match is None:
        raise UserError(f"--device {name}: expected cuda, cuda:N, cpu or tpu")
    kind, index = _PLATFORMS[match[1]], match[2]
    if kind == "cpu":
        # Before another backend starts and reserves memory.
        jax.config.update("jax_platforms", "cpu")
    try:
        devices = jax.local_devices(backend=kind)
    except RuntimeError:
        found = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        hint = _INSTALL.get(kind, "")
        raise UserError(f"--device {name}: JAX sees no such device, only {found}; {hint}") from None
    if index is None:
        return devices
    if int(index) >= len(devices):
        raise UserError(f"--device {name}: there are only {len(devices)}, counted from 0")
    return [devices[int(index)]]


def cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_of(device: jax.Device) -> int:
    """The number of bytes that may be used on a device; for CPUs, half of the machine's or the container's memory."""
    told = (device.memory_stats() or {}).get("bytes_limit")
    if told:
        return told
    memory = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max"
            memory.append(int(Path(limit).read_text()))
    return min(memory) // 2


class Joining(NamedTuple):
    """How a process joins those that it trains with.

    Attributes:
      coordinator: host:port of the first process; needed with the next two when processes are started by hand.
      processes, process: the number of processes, and this one's index from 0.
      multi_host: take all three from the launcher. None: if there is one that has started several processes.
      join_timeout: seconds to wait for the other processes.
      peer_timeout: seconds after which a process that does not answer is given up; see `peers`.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    multi_host: bool | None = None
    join_timeout: int = 300
    peer_timeout: int = 15

    def by_hand(self) -> bool:
        """Whether the three flags for processes started by hand are given.

        Raises:
          UserError: some are missing, or they contradict each other.
        """
        flags = {
            "--coordinator_address": self.coordinator,
            "--num_processes": self.processes,
            "--process_id": self.process,
        }
        given = [flag for flag, value in flags.items() if value is not None]
        if given and len(given) < len(flags):
            missing = [flag for flag in flags if flag not in given]
            raise UserError(
                f"{' and '.join(given)} given without {' and '.join(missing)}; they belong together"
            )
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise UserError(f"--process_id {self.process}: expected 0 to {self.processes - 1}")
        return bool(given)


def join_processes(joining: Joining, say: Callable[[str], object]) -> None:
    """Makes this process one of several that train together; call it before anything else uses a device.

    Raises:
      UserError: flags are missing, or the processes cannot reach each other.
    """
    launched = None
    if not (by_hand := joining.by_hand()):
        launched = None if joining.multi_host is False else launchers.launched()
        if launched is None and not joining.multi_host:
            return
        if launched and launched.process == 0:
            say(
                f"joining {launched.processes} processes started by {launched.by} (--no_multi_host trains alone)"
            )
    coordinator, processes, process, devices = joining.coordinator, joining.processes, joining.process, None
    if launched:
        coordinator, processes, process = launched.coordinator, launched.processes, launched.process
        devices = launched.devices
    if by_hand or launched:
        hint = f"do all {processes} run, and can they reach {coordinator}?"
    else:
        hint = "is this run by srun, mpirun or torchrun?"
    # Longer than ours, because JAX aborts the process. In the end the others wait for what the first one still saves.
    patience = max(100, 4 * joining.peer_timeout)
    missing = f"not all processes have joined within {joining.join_timeout} s (--join_timeout); {hint}"
    deadline = threading.Timer(joining.join_timeout, peers.give_up_joining, [process, missing])
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, devices,
            initialization_timeout=joining.join_timeout + _JAX_LATER, heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=_SHUTDOWN,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError among them
        reason = str(error).split("\n")[0]
        raise UserError(f"the processes cannot be joined ({reason}); {hint}") from None
    finally:
        deadline.cancel()
    if jax.process_count() > 1:
        store = distributed.global_state.client
        assert store is not None, "initialize has made it"
        peers.watch(peers.Peers(store, jax.process_index(), jax.process_count(), joining.peer_timeout))


def matmul_precision(dtype: DTypeLike) -> AbstractContextManager[None]:
    """A context in which float32 products are exact; by default GPUs round their factors to TF32."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def compiler_options(device: jax.Device) -> dict[str, bool | int] | None:
    """XLA's options for programs on a kind of device, for `jax.jit`; None: its defaults."""
    if device.platform != "gpu":
        return None
    return {name: value for name, value in _GPU_OPTIONS.items() if _is_option(name, value)}


@lru_cache
def _is_option(name: str, value: bool | int) -> bool:
    """Whether this version of XLA knows an option; it refuses to compile with others."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def select_dtype(name: str | None, devices: list[jax.Device]) -> DTypeLike:
    """The computation dtype that `--mixed_precision` names; None: fp16 on a GPU, bf16 on a TPU, fp32 on a CPU."""
    default = {"gpu": "fp16", "tpu": "bf16"}.get(devices[0].platform, "fp32")
    return DTYPES[name or default]
