"""Checkpoints are complete or absent, exact, and only the latest few are kept; those that do not fit are refused."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tsdsr_jax.errors import UserError
from tsdsr_jax.training import checkpoint
from tsdsr_jax.training.checkpoint import Checkpoints, Hash, find, read_meta, read_state
from tsdsr_jax.training.optimizer import LossScale
from tsdsr_jax.training.sharding import base_shardings, make_mesh
from tsdsr_jax.training.step import TrainState
from tsdsr_jax.weights.tensor_files import TensorSpec, TensorStream


class State(NamedTuple):
    step: jax.Array
    tree: dict
    empty: dict


def state(seed: int, size: int = 50) -> State:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return State(jnp.int32(seed), {"a/b": jnp.asarray(values), "c": {"d": jnp.ones((2, 3))}}, {})


def save(checkpoints: Checkpoints, step: int, size: int = 50) -> bool:
    files = {"x.safetensors": {"w": np.full(3, step, np.float32)}, "ema/x.safetensors": {"w": np.zeros(1)}}
    return checkpoints.save(step, state(step, size), meta(step), lambda state: files)


def no_files(state) -> dict:
    return {}


def meta(step: int) -> dict:
    return {"step": step, "samples": 0, "rows": 1, "identity": {}, "options": {}}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, notes: list[str]) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path / "run", 2, notes.append)
    yield made
    made.close()


def test_a_checkpoint_comes_back_exactly(checkpoints):
    assert save(checkpoints, 5) and checkpoints.wait() and checkpoints.failed is None
    path = find(checkpoints.folder, "latest")
    assert path.name == "checkpoint_0000005" and read_meta(path) == meta(5)
    found = read_state(path, jax.eval_shape(lambda: state(5)))
    assert isinstance(found, State)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state(5)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert load_file(path / "lora" / "x.safetensors")["w"].tolist() == [5, 5, 5]
    assert (path / "lora" / "ema" / "x.safetensors").is_file()


def test_the_state_may_be_reused_at_once(checkpoints):
    """The next step donates the state, so its buffers change while the checkpoint is still being written."""
    step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)
    for number in range(1, 6):
        current = state(number, 200_000)
        checkpoints.save(number, current, meta(number), no_files)
        jax.block_until_ready(step(current))
        checkpoints.wait()
        saved = read_state(checkpoints.path(number), state(number, 200_000))
        np.testing.assert_array_equal(saved.tree["a/b"], state(number, 200_000).tree["a/b"])


def test_the_latest_few_are_kept(checkpoints):
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "checkpoint_0000003",
        "checkpoint_0000004",
    ]


def test_incomplete_ones_do_not_count(checkpoints, tmp_path, notes):
    save(checkpoints, 1)
    checkpoints.wait()
    half = checkpoints.folder / "checkpoint_0000009.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.path(1), half)
    (checkpoints.folder / "checkpoint_notes").mkdir()
    assert find(checkpoints.folder, "latest") == checkpoints.path(1)
    # The next run removes what a killed run left behind.
    following = Checkpoints(checkpoints.folder, None, notes.append)
    save(following, 2)
    following.close()
    assert not half.exists() and find(checkpoints.folder, "latest") == checkpoints.path(2)


def test_links_with_names_of_their_own_are_not_the_latest(checkpoints, tmp_path):
    """Otherwise a link to another run's checkpoint would count as one of this run."""
    save(checkpoints, 1)
    checkpoints.wait()
    shutil.copytree(checkpoints.path(1), tmp_path / "other" / "checkpoint_0000009")
    link = checkpoints.folder / "checkpoint_best"
    link.symlink_to(tmp_path / "other" / "checkpoint_0000009")
    assert find(checkpoints.folder, "latest") == checkpoints.path(1)
    assert find(checkpoints.folder, "checkpoint_best") == link


def test_a_flag_names_a_checkpoint(checkpoints, tmp_path):
    assert find(tmp_path / "nothing here", "latest") is None
    save(checkpoints, 1)
    save(checkpoints, 12)
    checkpoints.wait()
    folder = checkpoints.folder
    assert find(folder, "latest") == find(folder, str(folder / "checkpoint_0000012")) == checkpoints.path(12)
    assert find(folder, "checkpoint_0000001") == folder / "checkpoint_0000001"
    with pytest.raises(UserError, match="no such checkpoint; expected latest, or a checkpoint_NUMBER folder"):
        find(folder, "checkpoint_0000002")
    with pytest.raises(
        UserError, match=r"not a checkpoint of this program .*did you mean .*checkpoint_0000012\?"
    ):
        find(tmp_path, "run")


def test_states_that_do_not_fit_are_refused(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    path = checkpoints.path(1)
    with pytest.raises(UserError, match=r"tree\.a/b is \(50,\), expected \(60,\)"):
        read_state(path, state(1, 60))
    with pytest.raises(UserError, match=r"does not fit this run: empty\.e is missing"):
        read_state(path, state(1)._replace(empty={"e": jnp.zeros(2)}))


@pytest.mark.parametrize("part", ["state", "meta"])
def test_damaged_ones_are_refused(checkpoints, part):
    save(checkpoints, 1, 5000)
    checkpoints.wait()
    path = checkpoints.path(1)
    for file in (path / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(
        UserError, match=r"this checkpoint cannot be read .*move it away and resume from an earlier one"
    ):
        read_meta(path) if part == "meta" else read_state(path, state(1, 5000))


def test_missing_parts_are_named(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    path = checkpoints.path(1)
    (path / "meta" / "metadata").write_text("{}")
    with pytest.raises(
        UserError, match="this checkpoint's meta lacks identity, options, rows, samples, step"
    ):
        read_meta(path)
    shutil.rmtree(path / "state")
    with pytest.raises(
        UserError, match=r"cannot be read \(.*\); move it away and resume from an earlier one"
    ):
        read_state(path, state(1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; skips the test if none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("not allowed to mount a small file system; test_a_failing_write... covers most of this")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_a_checkpoint_not_the_run(small_disk, notes):
    checkpoints = Checkpoints(small_disk / "run", 2, notes.append)
    for step in (1, 2):
        save(checkpoints, step, 100_000)
    checkpoints.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    for step in (3, 4):
        save(checkpoints, step, 100_000)
        assert not checkpoints.wait()
        assert checkpoints.failed == "No space left on device"
    assert "a checkpoint could not be saved (No space left on device); earlier ones are kept" in notes[0]
    # Both earlier checkpoints are complete, and saving works again once there is room.
    assert [path.name for path in sorted(checkpoints.folder.iterdir()) if not path.name.endswith("-tmp")] == [
        "checkpoint_0000001", "checkpoint_0000002"
    ]  # fmt: skip
    np.testing.assert_array_equal(
        read_state(checkpoints.path(2), state(2, 100_000)).tree["a/b"], state(2, 100_000).tree["a/b"]
    )
    filler.unlink()
    assert save(checkpoints, 5, 100_000) and checkpoints.wait() and checkpoints.failed is None
    checkpoints.close()
    assert find(checkpoints.folder, "latest").name == "checkpoint_0000005"


def test_a_failing_write_is_noted_and_the_next_one_works(checkpoints, notes, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(checkpoints, 1)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "leaves_by_name", full)
        save(checkpoints, 2)
        checkpoints.wait()
    assert checkpoints.failed == "No space left on device" and len(notes) == 1
    assert find(checkpoints.folder, "latest") == checkpoints.path(1)
    assert save(checkpoints, 3) and checkpoints.wait() and checkpoints.failed is None
    assert find(checkpoints.folder, "latest") == checkpoints.path(3)


def test_exports_are_made_tensor_by_tensor_in_the_background(checkpoints):
    made, training = [], threading.current_thread()

    def export(saved: State) -> dict:
        assert threading.current_thread() is not training
        value = saved.tree["a/b"]

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name in "xy":
                made.append(list(checkpoints.folder.rglob("*.part")))  # the file that is being written
                yield name, np.asarray(value)

        spec = TensorSpec(value.shape, value.dtype)
        return {"b.safetensors": TensorStream({"x": spec, "y": spec}, tensors), "config.json": "{}"}

    assert checkpoints.save(3, state(3), meta(3), export) and checkpoints.wait()
    assert [len(files) for files in made] == [1, 1]
    folder = checkpoints.path(3) / "lora"
    np.testing.assert_array_equal(load_file(folder / "b.safetensors")["y"], state(3).tree["a/b"])
    assert {"b.safetensors", "config.json"} == {path.name for path in folder.iterdir()} - {
        "commit_success.txt"
    }


def spread(tree: State, fsdp: int) -> State:
    """The state with a matrix that is spread over `fsdp` of eight devices, as large networks are."""
    where = base_shardings(tree, make_mesh(fsdp=fsdp))

    def describe(leaf: jax.Array, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(describe, tree, where)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_each_process_saves_and_reads_its_own_part(checkpoints, monkeypatch, parts):
    """Nothing is gathered, whatever number of devices a checkpoint is resumed on; only the exported files are whole."""
    matrix = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    here = State(jnp.int32(7), {"a": {"kernel": matrix}, "b": np.ones(3, np.float32)}, {})
    four = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), here, spread(here, 4))
    assert four.tree["a"]["kernel"].addressable_shards[0].data.shape == (16, 6)
    monkeypatch.setattr(checkpoint, "leaf_to_host", lambda leaf: pytest.fail("gathered"))

    def export(saved: State) -> dict:
        return {"whole.safetensors": {"kernel": np.asarray(saved.tree["a"]["kernel"])}}

    assert checkpoints.save(7, four, meta(7), export) and checkpoints.wait() and not checkpoints.unexported
    like = spread(here, parts)
    found = read_state(checkpoints.path(7), like)
    for ours, wanted, expected in zip(*map(jax.tree.leaves, (found, like, here)), strict=True):
        assert ours.sharding.is_equivalent_to(wanted.sharding, ours.ndim) and ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, expected)
    whole = load_file(checkpoints.path(7) / "lora" / "whole.safetensors")
    np.testing.assert_array_equal(whole["kernel"], matrix)


@pytest.mark.parametrize("moment", ["before the first file", "within the second file"])
def test_a_failed_export_costs_neither_the_run_nor_the_checkpoint(checkpoints, notes, moment):
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "x", np.zeros(2)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def export(saved: State) -> dict:
        if moment == "before the first file":
            raise RuntimeError("cannot be made")
        spec = TensorSpec((2,), np.dtype(float))
        return {
            "ema/a.safetensors": {"x": np.zeros(2)},
            "b.safetensors": TensorStream({"x": spec, "y": spec}, tensors),
        }

    assert (
        checkpoints.save(3, state(3), meta(3), export) and checkpoints.wait() and checkpoints.failed is None
    )
    reason = "Disk quota exceeded" if "second" in moment else "cannot be made"
    path = checkpoints.path(3)
    assert checkpoints.unexported == reason
    assert notes == [
        f"{path}: lora could not be written ({reason}); the checkpoint can be resumed, training continues"
    ]
    assert find(checkpoints.folder, "latest") == path and not list((path / "lora").rglob("*a*"))
    np.testing.assert_array_equal(read_state(path, state(3)).tree["a/b"], state(3).tree["a/b"])
    assert save(checkpoints, 4) and checkpoints.wait() and len(notes) == 1
    assert (checkpoints.path(4) / "lora" / "x.safetensors").is_file() and checkpoints.unexported is None


def test_hashes_depend_on_names_values_dtypes_and_shapes():
    def of(name: str, array: np.ndarray) -> str:
        digest = Hash()
        digest.add(name, array)
        return digest.value()

    array = np.arange(6, dtype=np.float32)
    different = [
        of("a", array), of("b", array), of("a", array + 1), of("a", array.astype(np.float16)), of("a", array.reshape(2, 3))
    ]  # fmt: skip
    assert len(set(different)) == 5 and of("a", array.copy()) == different[0]


class EarlierDistillation(NamedTuple):
    """The state that train/distill.py saved before all networks shared one kind of state."""

    step: jax.Array
    bad_steps: jax.Array
    student: dict
    auxiliary: dict
    student_optimizer: dict
    auxiliary_optimizer: dict
    ema: dict
    loss_scale: LossScale


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("parts", [("student", "auxiliary"), ("network",)])
def test_states_of_earlier_versions_are_read(checkpoints, parts, average):
    trees = {name: {"blocks_0": {"a": jnp.full(3, index + 1.0)}} for index, name in enumerate(parts)}
    moments = {name: {"mu": jnp.full(3, index + 11.0)} for index, name in enumerate(parts)}
    mean = {"blocks_0": {"a": jnp.full(3, 21.0)}} if average else {}
    counts, scale = (jnp.int32(4), jnp.int32(1)), LossScale(jnp.float32(8), jnp.int32(2))
    new = TrainState(*counts, trees, moments, {parts[0]: mean} if average else {}, scale)
    if len(parts) == 2:
        earlier = EarlierDistillation(*counts, *trees.values(), *moments.values(), mean, scale)
    else:
        earlier = TrainState(*counts, trees["network"], moments["network"], mean, scale)
    checkpoints.save(4, earlier, meta(4), no_files)
    assert checkpoints.wait()
    found = read_state(checkpoints.path(4), jax.eval_shape(lambda: new))
    jax.tree.map(np.testing.assert_array_equal, found, new)
    # If neither layout fits, the message uses today's names.
    other = new._replace(trained={name: {"blocks_1": tree["blocks_0"]} for name, tree in trees.items()})
    with pytest.raises(UserError, match=r"does not fit this run: trained\.\w+\.blocks_1\.a is missing"):
        read_state(checkpoints.path(4), other)
