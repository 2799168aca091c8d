"""Reading ahead in threads and processes: the same elements, and nothing left behind, however a run ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_batches import Numbers, batches, seen

from tsdsr_jax.data.batches import RowPlan
from tsdsr_jax.data.workers import read_ahead
from tsdsr_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def shared_memory() -> set[str]:
    """Python's blocks of shared memory on this machine."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_changes_nothing(workers):
    before = shared_memory()
    ahead = []
    for batch in read_ahead(batches(Numbers(10, bad=(4,)), RowPlan(0, 9, 1, 4)), workers):
        ahead.append(batch)
        assert not shared_memory() - before
    direct = list(batches(Numbers(10, bad=(4,)), RowPlan(0, 9, 1, 4)))
    assert seen(ahead) == seen(direct)
    assert [batch.problems for batch in ahead] == [batch.problems for batch in direct]
    assert all(type(leaf) is np.ndarray for leaf in ahead[0].records)


class Endless:
    """Element i is i; importable by worker processes. The reader of `fatal` is killed."""

    def __init__(self, fatal: int | None = None):
        self.fatal = fatal

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_workers_end_with_a_parent_that_is_killed():
    code = (
        "from test_workers import Endless, read_ahead\nfrom time import sleep\n"
        "print(next(read_ahead(Endless(), 1)), flush=True); sleep(100)"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/data")))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert process.stdout.readline() == "0\n"
    process.kill()
    # The workers hold the other end of the pipe as long as they live.
    assert process.communicate(timeout=60)[0] == ""


def test_a_worker_that_is_killed_is_reported_in_one_line():
    with pytest.raises(UserError, match=r"^--dataloader_num_workers 1: a worker .* SIGKILL .*memory.* fewer"):
        list(read_ahead(Endless(fatal=2), 1))


@pytest.mark.parametrize("reason", ["No space left on device", "Function not implemented"])
def test_without_room_for_semaphores_one_line_says_what_to_pass(monkeypatch, reason):
    """As in containers with a small or no /dev/shm."""

    def refuse(*_arguments, **_more):
        raise OSError(28, reason)

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(UserError, match=rf"({reason}).*/dev/shm.*--dataloader_num_workers 0$"):
        next(read_ahead(Endless(), 2))


class Unreadable(Endless):
    def __getitem__(self, index: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", "photo.png")


def test_errors_of_samples_keep_their_type():
    with pytest.raises(FileNotFoundError, match=r"photo\.png"):
        next(read_ahead(Unreadable(), 0))


def test_workers_need_no_jax_backend():
    """Nothing that workers import starts a device; Grain itself may import jax."""
    code = (
        "import sys; before = set(sys.modules); import tsdsr_jax.data.workers; "
        "print([m for m in ('flax', 'torch') if m in sys.modules], 'jax._src.xla_bridge' in sys.modules "
        "and sys.modules['jax._src.xla_bridge'].backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[] False\n", done.stderr
