"""Object stores, tried with S3's protocol on this machine (moto)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

import tiny_checkpoint as tiny
import tiny_training
from training_processes import TrainingProcesses, free_port
from tsdsr_jax import cli, storage
from tsdsr_jax.commands import prepare, upscale
from tsdsr_jax.errors import UserError
from tsdsr_jax.storage import OutputFolder, as_given, fetched
from tsdsr_jax.training.checkpoint import Checkpoints, find, read_state
from tsdsr_jax.weights.bundled import FOLDER

moto = pytest.importorskip("moto.server", reason="needs moto, a store that speaks S3")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """A store, and the variables with which it is found."""
    port = free_port()
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    running.stop()


@pytest.fixture
def store(server, tmp_path, monkeypatch) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket called `bucket`; this machine's copies are in a folder of this test."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    storage._outputs.clear()
    system.invalidate_cache()
    system.rm("bucket", recursive=True)


def names(store: s3fs.S3FileSystem, folder: str = "bucket") -> list[str]:
    store.invalidate_cache()
    return sorted(path.removeprefix(f"{folder}/") for path in store.find(folder))


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/photos", "ftp:// is not served; expected a path on this machine, or s3://, gs://, az://, hf://"),
        ("https://host/a.png", "https:// is not served"),
        ("az://box/photos", "az:// needs a package that is not installed: pip install 'tsdsr_jax[azure]'"),
        ("s3://bucket/nothing", "no such file or folder"),
        ("s3://no-such-bucket/photos", "--hr_dir s3://no-such-bucket/photos: "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(store, url, words):
    with pytest.raises(UserError) as caught:
        fetched(url, "--hr_dir")
    assert f"--hr_dir {url}: " in str(caught.value) and words in str(caught.value)


def test_a_store_that_does_not_answer_is_named(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"--hr_dir s3://bucket/a: cannot be reached \("):
        fetched("s3://bucket/a", "--hr_dir")


def test_only_what_has_changed_is_copied_again(store, monkeypatch):
    for name in ("a.txt", "b/c.txt", "b/d e.txt"):
        store.pipe(f"bucket/set/{name}", name.encode())
    copied: list[str] = []
    get = storage._get

    def counting(place: object, target: Path, wanted: dict[str, object], flag: str) -> Iterator[str]:
        copied.extend(wanted)
        return get(place, target, wanted, flag)

    monkeypatch.setattr(storage, "_get", counting)
    copy = fetched("s3://bucket/set/", "--data_dir")
    assert copy.name == "set" and (copy / "b/d e.txt").read_text() == "b/d e.txt" and len(copied) == 3
    copied.clear()
    assert fetched("s3://bucket/set", "--data_dir") == copy and not copied
    store.pipe("bucket/set/a.txt", b"new")
    store.rm("bucket/set/b/c.txt")
    (copy / "b/d e.txt").unlink()  # by hand
    fetched("s3://bucket/set", "--data_dir")
    assert copied == ["a.txt", "b/d e.txt"] and (copy / "a.txt").read_text() == "new"
    assert not (copy / "b/c.txt").exists()


def test_a_copy_that_was_interrupted_is_not_taken_for_another_version(store, monkeypatch):
    def put(version: str) -> None:
        for name in "ab":
            store.pipe(f"bucket/set/{name}", version.encode())

    put("first")
    copy = fetched("s3://bucket/set", "--data_dir")
    put("later")
    get = storage._get

    def torn(*arguments: object) -> Iterator[str]:
        yield next(get(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "_get", torn)
        fetched("s3://bucket/set", "--data_dir")
    put("first")  # the same bytes have the same ETag again
    fetched("s3://bucket/set", "--data_dir")
    assert [(copy / name).read_text() for name in "ab"] == ["first", "first"]


def test_markers_of_folders_and_names_that_lead_out(store, tmp_path):
    store.pipe("bucket/marked/", b"")
    store.pipe("bucket/marked/a/", b"")
    store.pipe("bucket/marked/a/b.txt", b"b")
    copy = fetched("s3://bucket/marked", "--data_dir")
    assert [path.name for path in copy.rglob("*") if path.is_file()] == ["b.txt"]
    store.rm("bucket/marked/a", recursive=True)
    store.pipe("bucket/marked/a", b"a file now")
    assert (fetched("s3://bucket/marked", "--data_dir") / "a").read_text() == "a file now"
    store.pipe("bucket/evil/../../../out.txt", b"evil")
    with pytest.raises(UserError, match="leads out of the folder"):
        fetched("s3://bucket/evil", "--data_dir")
    assert not list(tmp_path.rglob("out.txt"))


def test_results_are_no_input(store):
    store.pipe("bucket/photos/a.png", b"photo")
    store.pipe("bucket/photos/large/a.png", b"result")
    copy = fetched("s3://bucket/photos", "-i", ["s3://bucket/photos/large/"])
    assert [path.relative_to(copy).as_posix() for path in copy.rglob("*.png")] == ["a.png"]
    with pytest.raises(UserError, match="is also the output folder"):
        fetched("s3://bucket/photos/", "-i", ["s3://bucket/photos"])


def test_a_single_file_is_copied_under_its_name(store):
    store.pipe("bucket/lora/teacher.safetensors", b"values")
    copy = fetched("s3://bucket/lora/teacher.safetensors", "--checkpoint_path")
    assert copy.name == "teacher.safetensors" and copy.read_bytes() == b"values"
    assert as_given(f"{copy}: too short") == "s3://bucket/lora/teacher.safetensors: too short"


# --- what is written ------------------------------------------------------------------------------


def test_results_come_to_the_store_and_back(store):
    first = OutputFolder("s3://bucket/run/", "--output_dir", print)
    assert first.local.name == "run" and not list(first.local.iterdir())
    (first.local / "validation").mkdir()
    (first.local / "validation/1.png").write_bytes(b"1")
    (first.local / ".half.part").write_bytes(b"half")
    first.push()
    assert names(store, "bucket/run") == ["validation/1.png"]
    (first.local / "log.jsonl").write_text("a\n")
    first.finish()
    assert names(store, "bucket/run") == ["log.jsonl", "validation/1.png"] and not first.local.exists()
    second = OutputFolder("s3://bucket/run", "--output_dir", print)
    assert (second.local / "log.jsonl").read_text() == "a\n"
    second.finish()


def test_checkpoints_in_a_store_are_complete_or_do_not_count(store, monkeypatch):
    folder = OutputFolder("s3://bucket/run", "--output_dir", print)
    checkpoints = Checkpoints(folder.local, 2, print)
    put, order = storage._put, list[str]()

    def recording(place: object, file: Path, name: str) -> None:
        order.append(name)
        put(place, file, name)

    monkeypatch.setattr(storage, "_put", recording)
    for step in (1, 2, 3):
        state = {"a": jnp.arange(4.0) + step}
        meta = {"step": step, "samples": 0, "rows": 1, "identity": {}, "options": {}}
        checkpoints.save(step, state, meta, lambda saved: {"x.txt": "made"})
        checkpoints.wait()
        folder.push()
    assert order[-1] == "checkpoint_0000003/_CHECKPOINT_METADATA"
    assert {name.split("/")[0] for name in names(store, "bucket/run")} == {
        "checkpoint_0000002",
        "checkpoint_0000003",
    }
    # As if the process had been killed while it copied the third.
    store.rm_file("bucket/run/checkpoint_0000003/_CHECKPOINT_METADATA")
    elsewhere = OutputFolder("s3://bucket/run", "--output_dir", print)
    assert find(elsewhere.local, "latest").name == "checkpoint_0000002"
    found = read_state(find(elsewhere.local, "latest"), {"a": jnp.zeros(4)})
    np.testing.assert_array_equal(found["a"], np.arange(4.0) + 2)
    with pytest.raises(UserError, match="this checkpoint is incomplete in the store"):
        fetched("s3://bucket/run/checkpoint_0000003", "--resume_from_checkpoint")
    copy = fetched("s3://bucket/run/checkpoint_0000002", "--resume_from_checkpoint")
    assert find(elsewhere.local, str(copy)) == copy and (copy / "lora/x.txt").read_text() == "made"
    elsewhere.finish()
    checkpoints.close()
    folder.finish()


def test_checkpoints_of_earlier_starts_go_with_the_removed_ones(store):
    """They are not copied here, because only the latest is needed."""

    def checkpoint(folder: OutputFolder, step: int) -> None:
        path = folder.local / f"checkpoint_{step:07d}"
        path.mkdir()
        (path / "_CHECKPOINT_METADATA").write_text("{}")

    def there() -> set[str]:
        return {name.split("/")[0] for name in names(store, "bucket/run")}

    store.pipe("bucket/run/old_checkpoint_0000009/_CHECKPOINT_METADATA", b"{}")
    first = OutputFolder("s3://bucket/run", "--output_dir", print)
    for step in (9999999, 10000000):
        checkpoint(first, step)
    first.finish()
    second = OutputFolder("s3://bucket/run", "--output_dir", print)
    pulled = {path.name for path in second.local.iterdir()}
    assert pulled == {"old_checkpoint_0000009", "checkpoint_10000000"}
    checkpoint(second, 10000001)
    second.push()
    assert "checkpoint_9999999" in there()
    checkpoint(second, 10000002)
    shutil.rmtree(second.local / "checkpoint_10000000")
    second.push()
    assert there() == {"old_checkpoint_0000009", "checkpoint_10000001", "checkpoint_10000002"}
    # A copy that is gone removes nothing.
    shutil.rmtree(second.local)
    with pytest.raises(OSError, match="No such file"):
        second.push()
    assert "checkpoint_10000002" in there()
    wanted = OutputFolder("s3://bucket/run", "--output_dir", print, "checkpoint_10000001")
    assert (wanted.local / "checkpoint_10000001").is_dir() and wanted.local != second.local
    wanted.finish()
    second._ended.set()


def test_what_cannot_be_written_is_refused_at_once(store):
    with pytest.raises(UserError, match="--output_dir s3://no-such-bucket/run: cannot be written: "):
        OutputFolder("s3://no-such-bucket/run", "--output_dir", print)
    with pytest.raises(UserError, match="names a file; in a store, give the folder"):
        OutputFolder("s3://bucket/a.png", "-o", print)


def test_one_file_that_cannot_be_brought_stops_no_other(store):
    folder = OutputFolder("s3://bucket/run", "--output_dir", print)
    for name in (b"a.png", b"b\xe9.png", b"c.png"):
        (folder.local / os.fsdecode(name)).write_bytes(name)
    with pytest.raises(UserError, match="all results are in"):
        folder.finish()
    assert names(store, "bucket/run") == ["a.png", "c.png"]


def test_a_store_that_fails_loses_nothing(store, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(storage, "_INTERVAL", 0.05)
    folder = OutputFolder("s3://bucket/run", "--output_dir", said.append)

    def broken(*_: object, **__: object) -> None:
        raise OSError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", broken)
        (folder.local / "a.txt").write_text("a")
        while not said:
            time.sleep(0.05)
        assert "s3://bucket/run: cannot be reached (the line is cut); trying again" in said[0]
        time.sleep(0.3)
        assert len(said) == 1
    while not names(store):
        time.sleep(0.05)
    (folder.local / "b.txt").write_text("b")
    folder._ended.set()
    folder._thread.join()
    monkeypatch.setattr(storage, "_put", broken)
    storage._given[folder.local] = folder.url
    with pytest.raises(UserError, match=r"all results are in (.*), copy them from there") as caught:
        folder.finish()
    assert str(folder.local) in as_given(str(caught.value)) and (folder.local / "b.txt").read_text() == "b"


# --- commands -------------------------------------------------------------------------------------


def test_photographs_are_upscaled_from_one_store_to_another(store, tmp_path, monkeypatch, capsys):
    Image.fromarray(tiny.synthetic_photo(16, 24, 1)).save(tmp_path / "a.png")
    store.put_file(str(tmp_path / "a.png"), "bucket/photos/day 1/a.png")
    store.put(f"{FOLDER}/", "bucket/model/", recursive=True)
    flags = ["--pretrained_model_name_or_path", "s3://bucket/model", "--embedding_dir", "s3://bucket/model/prompt/default",
             "--lora_dir", "none", "--process_size", "64"]  # fmt: skip

    def upscaled() -> str:
        monkeypatch.setattr(
            sys, "argv", ["infer/upscale.py", "-i", "s3://bucket/photos", "-o", "s3://bucket/large", *flags]
        )
        cli.run(upscale.main)
        return capsys.readouterr().out

    assert "cache" not in upscaled()
    assert names(store, "bucket/large") == ["day 1/a.png"]
    with store.open("bucket/large/day 1/a.png") as file:
        assert Image.open(file).size == (96, 64)
    again = upscaled()
    assert "already" in again


def test_what_cannot_be_written_to_a_store_is_refused(store, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["infer/upscale.py", "-i", "examples/photos", "--report", "s3://bucket/page.html"]
    )
    with pytest.raises(SystemExit):
        cli.run(upscale.main)
    assert (
        "--report s3://bucket/page.html: cannot be written there; give a path on this machine"
        in capsys.readouterr().err
    )


def test_several_processes_do_not_prepare_one_set_in_a_store(store, tmp_path, monkeypatch, capsys):
    """They would not see each other's files. One may."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(tiny.synthetic_photo(128, 160, 1)).save(photos / "a.png")
    flags = ["--hr_dir", str(photos), "--output_dir", "s3://bucket/set", "--crop_size", "128", "--min_size", "128",
             "--pretrained_model_name_or_path", str(FOLDER)]  # fmt: skip

    def prepared(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train/prepare.py", *flags, *more])
        cli.run(prepare.main)
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        prepared("--shard", "1/2")
    assert "--output_dir s3://bucket/set: several processes cannot write" in capsys.readouterr().err
    assert not names(store)
    assert "s3://bucket/set: 1 samples" in prepared("--shard", "0/1")
    assert "manifest.json" in names(store, "bucket/set")


def test_an_error_is_told_before_that_of_the_store(store, monkeypatch, capsys):
    """And nothing is copied before the whole command line makes sense."""

    def fails() -> None:
        storage.output_folder("s3://bucket/run", "--output_dir").joinpath("a.txt").write_text("a")
        monkeypatch.setattr(storage, "_put", lambda *_: (_ for _ in ()).throw(OSError("the line is cut")))
        raise UserError("20 steps in a row were not finite")

    monkeypatch.setattr(sys, "argv", ["train/distill.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(fails)
    first, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "the line is cut" in first and "outputs" in first
    assert last == "distill.py: 20 steps in a row were not finite"
    monkeypatch.setattr(sys, "argv", ["infer/upscale.py", "-i", "s3://bucket/no", "--process_size", "abc"])
    with pytest.raises(SystemExit) as end:
        cli.run(upscale.main)
    assert end.value.code == 2 and "--process_size" in capsys.readouterr().err


@pytest.fixture
def machines(store, server, tmp_path):
    """Starts train/distill.py as if on machines that share nothing but the store."""
    _, vae = tiny_training.save_models(tmp_path / "made")
    tiny_training.save_set(tmp_path / "made/set", vae, 10)
    for folder in ("sd3", "default", "null", "set"):
        store.put(f"{tmp_path / 'made' / folder}/", f"bucket/{folder}/", recursive=True)
    processes = TrainingProcesses(tmp_path, tmp_path / "programs")

    def start(machine: str, run: str, *more: str) -> subprocess.Popen:
        often = ("--max_train_steps", "12", "--checkpointing_steps", "2", "--logging_steps", "1")
        always = ("--resume_from_checkpoint", "latest")
        flags = tiny_training.flags(Path("/given"), Path("/given/run"), *often, *always, *more)
        flags = [
            flag.replace("/given/run", f"s3://bucket/{run}").replace("/given", "s3://bucket")
            for flag in flags
        ]
        return processes.start(
            "distill", flags, variables=server | {"XDG_CACHE_HOME": str(tmp_path / machine)}
        )

    yield start
    processes.end()


def adapters(store: s3fs.S3FileSystem, run: str) -> dict[str, np.ndarray]:
    folder = f"bucket/{run}/checkpoint_0000012/lora"
    return {f"{file} {name}": tensor for file in ("transformer", "vae")
            for name, tensor in load(store.cat_file(f"{folder}/{file}.safetensors")).items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_killed_and_goes_on_elsewhere(store, machines, processes):
    """Bit for bit as if nothing had happened. Two and four minutes on two busy cores; 2026-11-29: passed."""

    def started(machine: str, run: str) -> list[subprocess.Popen]:
        if processes == 1:
            return [machines(machine, run)]
        together = (
            "--coordinator_address",
            f"localhost:{free_port()}",
            "--num_processes",
            "2",
            "--train_batch_size",
            "1",
        )
        return [
            machines(f"{machine}{index}", run, *together, "--process_id", str(index)) for index in range(2)
        ]

    def finish(group: list[subprocess.Popen]) -> None:
        for process in group:
            assert process.wait(timeout=300) == 0, process.printed.read_text()

    finish(started("one", "whole"))
    group = started("one", "run")
    while not any("_CHECKPOINT_METADATA" in name for name in names(store) if name.startswith("run/")):
        assert group[0].poll() is None or names(store, "bucket/run"), group[0].printed.read_text()
        time.sleep(0.2)
    for process in group:
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = started("two", "run")
    finish(again)
    printed = again[0].printed.read_text()
    assert "cache" not in printed and "s3://bucket/run" in printed
    expected, found = adapters(store, "whole"), adapters(store, "run")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)
