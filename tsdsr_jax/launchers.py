"""What a launcher says about the processes that it has started: srun, mpirun, or torchrun. No jax here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from tsdsr_jax.errors import UserError


class LaunchedProcess(NamedTuple):
    """One of several processes that a launcher has started together.

    Attributes:
      by: the launcher.
      process, processes: this process's number, and how many there are.
      coordinator: host:port of the first process; None: JAX finds it out from the launcher.
      devices: numbers of this process's GPUs, with a `coordinator`; None: all.
    """

    by: str
    process: int
    processes: int
    coordinator: str | None = None
    devices: list[int] | None = None


def launched(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
    """Returns what a launcher says; None if this process was started alone.

    Inside `sbatch` or `salloc`, SLURM's variables count tasks that only `srun` starts, so those of its steps are read.

    Raises:
      UserError: a launcher's variable is not a number.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        # torchrun itself listens on MASTER_PORT.
        port = _number(environment, "MASTER_PORT") + 1
        alone_here = environment.get("LOCAL_WORLD_SIZE", "1") == "1"
        devices = None if alone_here else [_number(environment, "LOCAL_RANK")]
        coordinator = f"{environment['MASTER_ADDR']}:{port}"
        found = LaunchedProcess(
            "torchrun", _number(environment, "RANK"), _number(environment, "WORLD_SIZE"), coordinator, devices
        )
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        found = LaunchedProcess(
            "srun", _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        )
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        found = LaunchedProcess(
            "mpirun",
            _number(environment, "OMPI_COMM_WORLD_RANK"),
            _number(environment, "OMPI_COMM_WORLD_SIZE"),
        )
    else:
        return None
    return found if found.processes > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {name} is {text!r}; expected a number, as its launcher sets it"
        )
    return int(text)
