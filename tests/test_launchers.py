"""What launchers say; their variables as srun 22.05, Open MPI 4.1 and torchrun 2 set them."""

import pytest

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.launchers import LaunchedProcess, launched

SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
            "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SBATCH, None),  # the batch script itself, or `salloc`: nobody has started the other tasks
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, LaunchedProcess("srun", 2, 4)),
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, LaunchedProcess("mpirun", 1, 2)),
        (TORCHRUN, LaunchedProcess("torchrun", 3, 8, "node1:29501", [1])),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, LaunchedProcess("torchrun", 3, 8, "node1:29501", None)),
        (
            TORCHRUN | SBATCH | {"SLURM_STEP_NUM_TASKS": "4"},
            LaunchedProcess("torchrun", 3, 8, "node1:29501", [1]),
        ),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "8"}, None),  # left over in a shell
    ],
)
def test_a_launcher_is_seen_where_it_has_started_several(environment, expected):
    assert launched(environment) == expected


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UserError, match="MASTER_PORT is 'tcp'"):
        launched(TORCHRUN | {"MASTER_PORT": "tcp"})


def test_shares_come_from_the_launcher_unless_given(monkeypatch):
    assert cli.share(None) == cli.Share(0, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert cli.share(None) == cli.Share(3, 8) and cli.share("1/2") == cli.Share(1, 2)
