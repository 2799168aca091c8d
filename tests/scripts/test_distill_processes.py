"""Training in separate processes: killed, stopped, and several together."""

import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_training
from training_processes import TrainingProcesses, free_port
from tsdsr_jax.peers import PEER_ENDED
from tsdsr_jax.training import checkpoint
from tsdsr_jax.training.log import TIMINGS, read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
# A checkpoint every few steps, so that some are being written when the process is killed.
LONG = """--max_train_steps 20 --checkpointing_steps 2 --checkpoints_total_limit 2 --validation_steps 20 --logging_steps 1
--resume_from_checkpoint latest""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "compiled by processes"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    _, vae = tiny_training.save_models(folder)
    tiny_training.save_set(folder / "set", vae, 10)
    return folder


@pytest.fixture
def start(root: Path, cache: Path, tmp_path: Path):
    """Starts the command, with its output in a file."""
    processes = TrainingProcesses(tmp_path, cache)

    def start(output: Path, *more: str, devices: int = 1, script: str = "distill") -> subprocess.Popen:
        flags = tiny_training.flags if script == "distill" else tiny_training.teacher_flags
        return processes.start(script, [*flags(root, output), *more], devices)

    yield start
    processes.end()


def finish(process: subprocess.Popen, status: int = 0) -> str:
    found = process.wait(timeout=300)
    printed = process.printed.read_text()
    assert found == status, printed
    assert "Traceback" not in printed, printed
    return printed


def adapters(output: Path) -> dict[str, np.ndarray]:
    folder = checkpoint.find(output, "latest") / "lora"
    return {f"{path.stem} {name}": tensor for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()}  # fmt: skip


def everything(output: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Returns the last checkpoint's state as bytes, and the log without timings."""
    import orbax.checkpoint as ocp

    folder = checkpoint.find(output, "latest").resolve() / "state"
    with ocp.StandardCheckpointer() as reader:
        # Host arrays: devices of other processes, whose shards these may be, are not here.
        leaves = reader.metadata(folder).item_metadata.tree
        state = reader.restore(folder, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), leaves))
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(output / "log.jsonl")]
    return {name: np.asarray(leaf).tobytes() for name, leaf in state.items()}, rows


def disturb(start, output: Path, kinds: list[signal.Signals], seed: int, *more: str) -> None:
    """Starts the run once per signal, and sends it at a random moment while the run trains or saves."""
    generator, statuses = random.Random(seed), []
    for kind in kinds:
        process = start(output, *LONG, *more)
        before = {path.name for path in output.glob("checkpoint_*")} if output.is_dir() else set()
        while process.poll() is None and not ({path.name for path in output.glob("checkpoint_*")} - before):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.25))
        process.send_signal(kind)
        statuses.append(process.wait(timeout=120))
        expected = -signal.SIGKILL if kind == signal.SIGKILL else 143
        assert statuses[-1] in (0, expected), process.printed.read_text()
    assert any(statuses), "every signal came too late"


def check_disturbed(start, tmp_path: Path, kinds: list[signal.Signals], seed: int, *more: str) -> None:
    finish(start(tmp_path / "whole", *LONG, *more))
    disturb(start, tmp_path / "disturbed", kinds, seed, *more)
    finish(start(tmp_path / "disturbed", *LONG, *more))
    assert everything(tmp_path / "disturbed") == everything(tmp_path / "whole")


def test_a_run_that_was_killed_ends_as_if_it_had_not(start, tmp_path):
    check_disturbed(start, tmp_path, [signal.SIGKILL], seed=3)


@pytest.mark.slow
def test_ten_kills_and_five_stops(start, tmp_path):
    """Four and a half minutes on two cores; 2026-11-26: passed."""
    kinds = [signal.SIGKILL] * 10 + [signal.SIGTERM] * 5
    random.Random(1).shuffle(kinds)
    more = ("--max_train_steps", "100", "--checkpointing_steps", "5", "--gradient_accumulation_steps", "2")
    check_disturbed(start, tmp_path, kinds, 11, *more)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(start, tmp_path):
    """Two minutes on two cores; 2026-11: passed."""
    together = (
        "--coordinator_address",
        f"localhost:{free_port()}",
        "--num_processes",
        "2",
        "--train_batch_size",
        "1",
    )

    def pair(output: Path, steps: int):
        flags = (
            "--max_train_steps",
            str(steps),
            "--resume_from_checkpoint",
            "latest",
            "--checkpointing_steps",
            "10",
        )
        return [start(output, *flags, *together, "--process_id", str(index), devices=4) for index in range(2)]

    processes = pair(tmp_path / "run", 500)
    while not (tmp_path / "run" / "checkpoint_0000010").is_dir():
        assert processes[0].poll() is None, processes[0].printed.read_text()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [143, 143]
    step = checkpoint.step_of(checkpoint.find(tmp_path / "run", "latest"))
    # While it starts again, before the first step.
    processes = pair(tmp_path / "run", 500)
    while "resuming from" not in processes[0].printed.read_text():
        assert processes[0].poll() is None, processes[0].printed.read_text()
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [143, 143]
    stopped = checkpoint.step_of(checkpoint.find(tmp_path / "run", "latest"))
    assert step < stopped <= step + 2
    step = stopped
    for process in pair(tmp_path / "run", step + 2):
        finish(process)
    assert checkpoint.step_of(checkpoint.find(tmp_path / "run", "latest")) == step + 2


SHORT = ("--max_train_steps", "3", "--checkpointing_steps", "3", "--validation_steps", "3")


def test_two_processes_of_four_devices_train_like_one_device(start, tmp_path):
    alone = start(tmp_path / "alone", *SHORT, "--train_batch_size", "8")
    together = ("--coordinator_address", f"localhost:{free_port()}", "--num_processes", "2")
    pair = [
        start(
            tmp_path / "pair",
            *SHORT,
            "--train_batch_size",
            "1",
            *together,
            "--process_id",
            str(index),
            devices=4,
        )
        for index in range(2)
    ]
    printed = finish(alone), *map(finish, pair)
    assert "8 × cpu in 2 processes" in printed[1] and "validation" not in printed[2]
    expected, found = adapters(tmp_path / "alone"), adapters(tmp_path / "pair")
    assert found.keys() == expected.keys()
    # B starts at 0, so its value is its movement. A's movement is far smaller than its value.
    moved = {name for name in expected if "lora_B" in name}
    distance = np.sqrt(sum(np.sum(np.square(found[name] - expected[name]), dtype=float) for name in moved))
    length = np.sqrt(sum(np.sum(np.square(expected[name]), dtype=float) for name in moved))
    assert length > 0 and distance <= 1e-4 * length
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-5)), found, expected))


def newest(output: Path) -> str:
    return max((path.name for path in output.glob("checkpoint_*")), default="")


@pytest.mark.slow
def test_two_processes_are_ended_ten_times(start, tmp_path):
    """Either process, by either signal, at random moments; both are started again when both have ended, as a job is that is
    put back in its queue. Nine minutes on two busy cores; 2026-11-29: passed."""
    steps = ("--max_train_steps", "120", "--checkpointing_steps", "4", "--train_batch_size", "1")

    def pair(output: Path) -> list[subprocess.Popen]:
        together = (
            "--coordinator_address",
            f"localhost:{free_port()}",
            "--num_processes",
            "2",
            "--join_timeout",
            "30",
            "--peer_timeout",
            "5",
        )
        flags = (*LONG, *steps, *together)
        return [start(output, *flags, "--process_id", str(index), devices=2) for index in range(2)]

    for process in pair(tmp_path / "whole"):
        finish(process)
    generator, output, ends, reached = random.Random(5), tmp_path / "disturbed", [], set()
    for turn, kind in enumerate(generator.sample([signal.SIGKILL, signal.SIGTERM] * 5, 10)):
        processes, before = pair(output), newest(output)
        # Three in ten while they start, the others while they train or save.
        if turn % 3 == 2:
            time.sleep(generator.uniform(2, 12))
        else:
            while newest(output) == before and processes[0].poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.5))
        processes[generator.randrange(2)].send_signal(kind)
        ends.append([process.wait(timeout=120) for process in processes])
        # 75: because of the other one; 1: the other one did not come.
        assert all(status in (0, 1, 75, 143, -signal.SIGKILL, -signal.SIGTERM) for status in ends[-1]), ends
        reached.add(newest(output))
    assert all(any(pair_ends) for pair_ends in ends), f"a signal came too late: {ends}"
    assert len(reached) > 4, f"too few of the processes came to train: {reached}, {ends}"
    for process in pair(output):
        finish(process)
    assert everything(output) == everything(tmp_path / "whole"), ends


@pytest.mark.slow
def test_a_network_spread_over_two_processes_is_resumed_by_one(start, tmp_path):
    """Equal to a whole run but for the rounding of sums over devices. 67 s on two cores; 2026-11-29: passed."""
    flags = (
        "--train",
        "base",
        "--fsdp",
        "4",
        "--ema_decay",
        "0.9",
        "--checkpointing_steps",
        "2",
        "--validation_steps",
        "9",
    )
    together = ("--coordinator_address", f"localhost:{free_port()}", "--num_processes", "2")
    first = (*flags, *together, "--max_train_steps", "2", "--train_batch_size", "1")
    pair = [
        start(tmp_path / "run", *first, "--process_id", str(index), devices=2, script="teacher")
        for index in range(2)
    ]
    for process in pair:
        finish(process)
    again = (
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        "latest",
        "--fsdp",
        "1",
        "--train_batch_size",
        "4",
    )
    finish(start(tmp_path / "run", *flags, *again, script="teacher"))
    whole = (*flags, "--fsdp", "1", "--train_batch_size", "4")
    finish(start(tmp_path / "whole", *whole, "--max_train_steps", "4", script="teacher"))
    for name in ("transformer", "ema/transformer"):
        file = f"checkpoint_0000004/model/{name}/diffusion_pytorch_model.safetensors"
        ours, theirs = (load_file(tmp_path / run / file) for run in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        apart = sum(np.square(ours[key] - theirs[key]).sum() for key in theirs)
        assert apart < 1e-10 * sum(np.square(tensor).sum() for tensor in theirs.values())


# --- processes that do not belong together --------------------------------------------------------


def pair_with(start, *flags: tuple[Path, tuple[str, ...]]) -> list[subprocess.Popen]:
    """Starts processes that train together, each with its own output folder and flags."""
    together = ("--coordinator_address", f"localhost:{free_port()}", "--num_processes", str(len(flags)))
    return [
        start(output, *more, *together, "--process_id", str(index))
        for index, (output, more) in enumerate(flags)
    ]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_process_whose_peers_do_not_come_says_so(start, tmp_path, alone):
    together = ("--coordinator_address", f"localhost:{free_port()}", "--num_processes", "2")
    process = start(tmp_path / "run", *together, "--process_id", str(alone), "--join_timeout", "3")
    printed = finish(process, status=1)
    assert printed.splitlines()[-1] == (
        f"stopping process {alone} on {socket.gethostname()}: not all processes have joined within 3 s (--join_timeout); "
        f"do all 2 run, and can they reach {together[1]}?"
    )
    assert "stack trace" not in printed


def test_processes_with_other_flags_or_devices_are_refused(start, tmp_path):
    first = ("--learning_rate", "1e-4", "--train_batch_size", "1", "--checkpointing_steps", "3")
    other = (
        "--learning_rate",
        "1e-2",
        "--train_batch_size",
        "2",
        "--checkpointing_steps",
        "4",
        "--log_name",
        "x",
    )
    for process in pair_with(start, (tmp_path / "run", first), (tmp_path / "run", other)):
        said = finish(process, 1)
        lines = said[said.index("the processes have different") :].splitlines()
        assert lines == [
            "the processes have different flags, versions or devices, so they cannot train together:",
            "  --checkpointing_steps: 3 in process 0; 4 in process 1",
            "  --learning_rate: 0.0001 in process 0; 0.01 in process 1",
            "  --train_batch_size: 1 in process 0; 2 in process 1",
        ], said
    assert not (tmp_path / "run").exists()


def test_processes_with_folders_of_their_own_are_refused(start, tmp_path):
    for process in pair_with(start, (tmp_path / "here", ()), (tmp_path / "there", ())):
        said = finish(process, 1)
        assert (
            "process 1 on " in said and f"do not see the folder {tmp_path / 'here'} of process 0" in said
        ), said
    assert list((tmp_path / "here").iterdir()) == []


def test_processes_with_other_data_are_refused(start, root, tmp_path):
    _, vae = tiny_training.save_models(tmp_path / "models")
    tiny_training.save_set(tmp_path / "set", vae, 10, seed=5)
    other = ("--data_dir", str(tmp_path / "set"))
    for process in pair_with(start, (tmp_path / "run", ()), (tmp_path / "run", other)):
        said = finish(process, 1)
        assert "different data, weights or checkpoints" in said and "data set's content: " in said, said
        assert "--" not in said.partition("together:")[2], said


# --- processes that end ---------------------------------------------------------------------------

# Seconds within which the others end, by default.
ENDED_WITHIN = 20


def training_pair(start, output: Path, *more: str) -> list[subprocess.Popen]:
    """Two processes that have begun to train for long."""
    flags = ("--max_train_steps", "100000", "--logging_steps", "1", "--train_batch_size", "1", *more)
    pair = pair_with(start, (output, flags), (output, flags))
    while not (output / "log.jsonl").exists() or (output / "log.jsonl").read_text().count('"student"') < 3:
        assert all(process.poll() is None for process in pair), [each.printed.read_text() for each in pair]
        time.sleep(0.1)
    return pair


KILLED = [
    pytest.param(1, signal.SIGKILL, "process 1 on .* has not answered for"),
    pytest.param(0, signal.SIGKILL, "process 0 .*(has ended or )?cannot be reached", marks=pytest.mark.slow),
    pytest.param(1, signal.SIGSTOP, "process 1 on .* has not answered for", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("victim", "kind", "words"), KILLED)
def test_a_process_that_is_gone_ends_the_other_soon(start, tmp_path, victim, kind, words):
    pair = training_pair(start, tmp_path / "run")
    began = time.monotonic()
    pair[victim].send_signal(kind)
    status = pair[1 - victim].wait(timeout=60)
    seconds = time.monotonic() - began
    printed = pair[1 - victim].printed.read_text()
    assert status == PEER_ENDED and seconds < ENDED_WITHIN, (status, seconds, printed)
    assert re.search(f"^stopping process {1 - victim} on .*: {words}", printed, re.MULTILINE), printed
    assert "Traceback" not in printed, printed


@pytest.mark.slow  # a minute; 2026-11-28: passed
def test_an_error_in_one_ends_the_other_with_its_reason(start, root, tmp_path):
    """The second process's set has a hole that its fingerprint does not cover."""
    output = tmp_path / "run"
    copy = shutil.copytree(root / "set", tmp_path / "set")
    pair = training_pair(start, output, "--data_dir", str(copy), "--max_bad_samples", "0")
    began = time.monotonic()
    for path in (copy / "gt").iterdir():
        path.write_bytes(b"")
    statuses = [process.wait(timeout=60) for process in pair]
    printed = [process.printed.read_text() for process in pair]
    assert set(statuses) <= {1, PEER_ENDED} and 1 in statuses, printed
    assert time.monotonic() - began < ENDED_WITHIN and "Traceback" not in "".join(printed), printed


@pytest.mark.slow  # a minute; 2026-11-28: passed
def test_ctrl_c_in_one_saves_in_all(start, tmp_path):
    pair = training_pair(start, tmp_path / "run")
    pair[1].send_signal(signal.SIGINT)
    assert [process.wait(timeout=60) for process in pair] == [143, 143]
    assert "all processes save and stop" in pair[1].printed.read_text()
    assert checkpoint.find(tmp_path / "run", "latest")
