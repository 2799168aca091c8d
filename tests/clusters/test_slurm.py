"""The job file under a real SLURM of one node. Needs root and Debian's slurm-wlm and munge.

Passed on 2026-11-28 in nine minutes on two busy cores, four of them SLURM's pauses before it starts a requeued job.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_training
from tsdsr_jax.training import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("slurm.sh")
HERE = shutil.which("slurmctld") and shutil.which("munged") and os.getuid() == 0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HERE, reason="no SLURM here, or not root")]
STEPS = 30
FLAGS = ("--max_train_steps", str(STEPS), "--checkpointing_steps", "2", "--validation_steps", "1000",
         "--train_batch_size", "1", "--logging_steps", "1", "--checkpoints_total_limit", "2")  # fmt: skip


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    """A running SLURM; its environment."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "up", folder, *map(str, free_ports(2))], check=True)
    yield os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([SCRIPT, "down", folder], check=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    _, vae = tiny_training.save_models(folder)
    tiny_training.save_set(folder / "set", vae, 10)
    return folder


class Job:
    """The job file, submitted with two tasks."""

    def __init__(self, environment: dict[str, str], root: Path, output: Path):
        self.environment, self.output, self.log = environment, output, output.with_suffix(".log")
        flags = [*tiny_training.flags(root, output), *FLAGS]
        command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0",
                   f"--output={self.log}", "cluster/slurm.sh", *flags]  # fmt: skip
        made = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        self.number = made.stdout.strip()

    def state(self) -> str:
        shown = self.run("scontrol", "show", "job", self.number)
        return shown.partition("JobState=")[2].split()[0]

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def wait_for(self, what, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not what():
            shown = self.run("scontrol", "show", "job", self.number) + (self.said() or "no log")
            assert time.monotonic() < end, shown
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def steps(self) -> int:
        found = checkpoint.find(self.output, "latest") if self.output.is_dir() else None
        return (checkpoint.step_of(found) or 0) if found else 0

    def tasks(self) -> list[int]:
        """Process numbers of the tasks."""
        found = subprocess.run(
            ["pgrep", "-f", f"distill.py --output_dir {self.output}"], capture_output=True, text=True
        )
        numbers = [int(word) for word in found.stdout.split()]
        return [
            number for number in numbers if Path(f"/proc/{number}/exe").resolve().name.startswith("python")
        ]


def adapters(output: Path) -> dict[str, np.ndarray]:
    folder = output / f"checkpoint_{STEPS:07d}" / "lora"
    return {f"{path.stem} {name}": tensor for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()}  # fmt: skip


def test_a_job_that_loses_a_task_or_is_preempted_goes_on_by_itself(slurm, root, tmp_path):
    whole = Job(slurm, root, tmp_path / "whole")
    whole.wait_for(lambda: whole.state() == "COMPLETED", 300)
    assert "joining 2 processes started by srun" in whole.said()

    job = Job(slurm, root, tmp_path / "disturbed")
    job.wait_for(lambda: job.steps() >= 4, 300)
    os.kill(job.tasks()[-1], signal.SIGKILL)
    job.wait_for(lambda: "requeuing" in job.said(), 60)
    job.wait_for(lambda: job.state() == "RUNNING" and job.steps() >= 10, 300)
    job.run("scancel", "--signal=TERM", job.number)  # as --signal does before the time is over
    job.wait_for(lambda: job.state() == "COMPLETED", 400)
    said = job.said()
    assert (
        said.count("requeuing job") == 2 and "status 143: requeuing" in said and "stopping process" in said
    ), said
    expected, found = adapters(tmp_path / "whole"), adapters(tmp_path / "disturbed")
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
