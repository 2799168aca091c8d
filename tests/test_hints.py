"""The commands that scripts print: complete, and right word for word from where the user stands."""

import dataclasses
import shlex
import sys
from pathlib import Path

import pytest

from tsdsr_jax import hints
from tsdsr_jax.commands import prepare, teacher
from tsdsr_jax.hints import command, given, new_folder
from tsdsr_jax.places import CHECKOUT
from tsdsr_jax.weights import prompt_hints


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(text: str) -> list[str]:
    """Without the interpreter."""
    return shlex.split(text)[1:]


def test_flags_are_spelled_as_they_are_read(here):
    flags = dict(
        pretrained_model_name_or_path="my model",
        hr_dir=(Path("a b"), Path("c")),
        crop_size=(128,),
        variant=None,
    )
    found = words(command("train/distill.py", **flags, sharpen_gt=False, use_dasm=True))
    script = str(CHECKOUT / "train/distill.py")
    assert found == [script, "--pretrained_model_name_or_path", "my model", "--hr_dir", "a b", "c", "--crop_size", "128",
                     "--no_sharpen_gt", "--use_dasm"]  # fmt: skip
    assert words(command("infer/upscale.py", output_dir=Path("-o"), names=("a", "-b")))[1:] == [
        "--output_dir=-o",
        "--names=a",
        "--names=-b",
    ]


def test_paths_are_short_below_the_current_folder_and_absolute_elsewhere(here, monkeypatch):
    assert words(command("infer/app.py", x=here / "b" / "c", y=Path("../d"), z=here.parent))[1:] == [
        "--x", "b/c", "--y", "../d", "--z", str(here.parent),
    ]  # fmt: skip
    monkeypatch.chdir(CHECKOUT)
    assert words(command("train/distill.py")) == ["train/distill.py"]
    monkeypatch.chdir(CHECKOUT / "train")
    assert words(command("infer/upscale.py")) == [str(CHECKOUT / "infer/upscale.py")]


def test_without_a_checkout_the_installed_commands_are_named(here, monkeypatch):
    monkeypatch.setattr(hints, "CHECKOUT", here)
    assert command("train/distill.py", seed=1) == "tsdsr-distill --seed 1"
    assert command("convert/sd3.py") == "tsdsr-convert-sd3"


def test_the_interpreter_is_called_python_where_that_is_the_one(here, monkeypatch):
    """Two environments of one Python are two interpreters, though both are links to the same file."""
    for name in ("one", "other"):
        (here / name / "bin").mkdir(parents=True)
        for python in ("python", "python3"):
            (here / name / "bin" / python).symlink_to(Path(sys.executable).resolve())
    monkeypatch.setattr(sys, "executable", str(here / "one/bin/python3"))
    monkeypatch.setenv("PATH", str(here / "one/bin"))
    assert hints.interpreter() == "python"
    monkeypatch.setenv("PATH", str(here / "other/bin"))
    assert hints.interpreter() == "one/bin/python3"
    monkeypatch.chdir(here / "one" / "bin")
    assert hints.interpreter() == str(here / "one/bin/python3")


def test_new_folders_lie_beside_the_run_and_are_not_there_yet(here):
    assert new_folder(Path("runs/a"), "upscaled") == Path("runs/a-upscaled")
    (here / "runs" / "a-upscaled").mkdir(parents=True)
    assert new_folder(Path("runs/a"), "upscaled") == Path("runs/a-upscaled-2")
    assert new_folder(Path("."), "set") == here.with_name(f"{here.name}-set")


def test_only_what_the_user_has_set_is_handed_over():
    options = teacher.Options(
        pretrained_model_name_or_path="sd3", train_batch_size=2, fsdp=1, hr_dir=(Path("a"),)
    )
    names = (*hints.MODEL, *hints.DATA, *hints.STEPS, "no such flag")
    assert given(options, *names) == {
        "pretrained_model_name_or_path": "sd3", "hr_dir": (Path("a"),), "train_batch_size": 2,
    }  # fmt: skip


def test_lpips_is_left_out_where_its_weights_are_not(here):
    flags = {"data_dir": Path("set")}
    assert words(hints.distilling(Path("run"), flags))[-4:] == [
        "--lambda_lpips",
        "0",
        "--output_dir",
        "run-distilled",
    ]
    hints.LPIPS_FILE.parent.mkdir()
    hints.LPIPS_FILE.touch()
    assert "--lambda_lpips" not in words(hints.distilling(Path("run"), flags))


def test_missing_embeddings_are_made_by_a_command_or_asked_for(here):
    options = prepare.Options(
        hr_dir=(), pretrained_model_name_or_path="sd3", no_t5=True, prompt_device="cuda"
    )
    (here / "sd3").mkdir()
    assert "sd3 has no text encoders" in prompt_hints.how_to_encode(options, "null", Path("dataset/null"))
    (here / "sd3" / "text_encoder").mkdir()
    made = [
        "--null",
        "--pretrained_model_name_or_path",
        "sd3",
        "--no_t5",
        "--device",
        "cuda",
        "--output",
        "dataset/null",
    ]
    assert words(prompt_hints.encoding(options, "null", Path("dataset/null")))[1:] == made
    elsewhere = dataclasses.replace(options, text_encoder_path="owner/encoders")
    assert "owner/encoders" in prompt_hints.encoding(elsewhere, "default", Path("dataset/default"))
    (here / "dataset" / "null").mkdir(parents=True)
    (here / "dataset" / "null" / "prompt.safetensors").touch()
    assert words(prompt_hints.encoding(options, "null", Path("dataset/null")))[1:] == [*made, "--overwrite"]
