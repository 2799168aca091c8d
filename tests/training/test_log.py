"""The log of a run: its lines, and what trackers get."""

import json
import sys
import types

import pytest
from PIL import Image

from tsdsr_jax.errors import UserError
from tsdsr_jax.training.log import (
    RunLog,
    TensorBoard,
    Wandb,
    check_trackers,
    read_rows,
)


class Collector:
    def __init__(self):
        self.seen, self.pictures, self.closed = [], [], False

    def scalars(self, step, values):
        self.seen.append((step, dict(values)))

    def picture(self, step, name, picture):
        self.pictures.append((step, name))

    def close(self):
        self.closed = True


def test_lines_are_written_and_shared(tmp_path):
    tracker = Collector()
    log = RunLog(tmp_path, None, [tracker])
    log.write(1, {"loss": 0.5, "bad": float("nan")})
    log.picture(1, "validation", Image.new("RGB", (4, 4)))
    log.close()
    # JSON has no NaN, and strict readers must be able to read the file.
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": 0.5,
        "bad": None,
    }
    assert tracker.seen[0][1]["loss"] == 0.5 and tracker.pictures == [(1, "validation")] and tracker.closed


def test_a_resumed_log_drops_later_lines_and_a_new_one_all(tmp_path):
    log = RunLog(tmp_path, None)
    for step in range(5):
        log.write(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut short when the run was killed
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe\x00 not text\n[1]\n")
    RunLog(tmp_path, 2).close()
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1, 2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    RunLog(elsewhere, 1, source=tmp_path).close()
    assert [row["step"] for row in read_rows(elsewhere / "log.jsonl")] == [0, 1]
    RunLog(tmp_path, None).close()
    assert read_rows(tmp_path / "log.jsonl") == []


def test_a_tracker_that_fails_is_dropped(tmp_path, capsys):
    class Broken(Collector):
        def scalars(self, step, values):
            raise ConnectionError("no network")

    whole = Collector()
    log = RunLog(tmp_path, None, [Broken(), whole])
    for step in range(3):
        log.write(step, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("Broken failed, continuing without it: no network") == 1
    assert len(whole.seen) == 3 and whole.closed and len(read_rows(tmp_path / "log.jsonl")) == 3


def test_tensorboard_without_its_writing_thread_fails_instead_of_waiting(tmp_path):
    tracker = TensorBoard(tmp_path / "logs")
    events = tracker._writer.file_writer.event_writer
    events._worker.stop()
    events._worker.join(timeout=10)
    with pytest.raises(OSError, match="cannot be written"):
        for step in range(1000):
            tracker.scalars(step, {"loss": 1.0})
    with pytest.raises(OSError, match="cannot be written"):
        tracker.close()


def test_a_full_disk_loses_lines_only(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path, None)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    for step in range(2000):
        log.write(step, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("No space left on device; lines of the log are lost") == 1


def test_missing_trackers_are_refused_with_a_remedy(monkeypatch):
    assert check_trackers("none") == ()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="--report_to wandb: wandb is not installed; pip install wandb, or pass"
    ):
        check_trackers("wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert check_trackers("all") == ("tensorboard", "wandb")


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    tracker = TensorBoard(tmp_path / "logs")
    tracker.scalars(3, {"loss": 0.25})
    tracker.picture(3, "validation", Image.new("RGB", (8, 8), (255, 0, 0)))
    tracker.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "logs").iterdir())
    assert b"loss" in content and b"validation" in content and b"PNG" in content


def test_wandb_gets_the_same_and_the_code_if_wanted(tmp_path, monkeypatch):
    """Uses a fake with the calls that wandb documents, so that the test needs no account."""
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append(("log", step, values))

        def log_code(self, root):
            calls.append(("code", root))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return FakeRun()

    fake = types.SimpleNamespace(init=init, Image=lambda picture: ("picture", picture.size))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Wandb(tmp_path / "logs", "project", {"rank": 4}, tmp_path)
    tracker.scalars(3, {"loss": 0.25})
    tracker.picture(3, "validation", Image.new("RGB", (8, 4)))
    tracker.close()
    assert (
        calls[0][1]["project"] == "project"
        and calls[0][1]["config"] == {"rank": 4}
        and (tmp_path / "logs").is_dir()
    )
    assert (
        calls[0][1]["id"] == (tmp_path / "logs" / "wandb_id.txt").read_text()
        and calls[0][1]["resume"] == "allow"
    )
    Wandb(tmp_path / "logs", "project", {}, None, new=False)
    assert calls.pop()[1]["id"] == calls[0][1]["id"]
    assert calls[1:] == [
        ("code", str(tmp_path)), ("log", 3, {"loss": 0.25}), ("log", 3, {"validation": ("picture", (8, 4))}), ("finish",),
    ]  # fmt: skip
