"""The next commands that training and preparation print work as printed, in the folder where they were called."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import tiny_checkpoint as tiny
import tiny_training
from commands import Command, printed
from tsdsr_jax import hints
from tsdsr_jax.commands import distill, prepare, teacher, upscale
from tsdsr_jax.places import CHECKOUT
from tsdsr_jax.training import options, sharding
from tsdsr_jax.weights.bundled import FOLDER
from tsdsr_jax.weights.sd3_folder import MERGED_FILE

pytestmark = pytest.mark.usefixtures("quick_compilation")

ONE_STEP = ("--max_train_steps", "1", "--checkpointing_steps", "9", "--validation_steps", "9")
MODEL = (
    "--pretrained_model_name_or_path", "sd3", "--default_embedding_dir", "default", "--crop_size", "32",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    root = tmp_path_factory.mktemp("printed")
    _, vae = tiny_training.save_models(root)
    tiny_training.save_set(root / "set", vae, 2)
    tiny_training.save_photos(root / "photos", 2)
    return root


@pytest.fixture
def root(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a copy of the models, one device, and a small photograph to upscale."""
    folder = shutil.copytree(models, tmp_path / "here")
    (tmp_path / "examples").mkdir()
    Image.fromarray(tiny.synthetic_photo(24, 24, 0)).save(tmp_path / "examples" / "a photo.png")
    monkeypatch.setattr(hints, "PHOTOS", tmp_path / "examples")
    monkeypatch.setattr(options, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))
    monkeypatch.setattr(prepare, "make_mesh", lambda: sharding.make_mesh(jax.devices()[:1]))
    monkeypatch.setattr(upscale, "select_devices", lambda name: jax.devices()[:1])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield folder
    for number, handler in before.items():
        signal.signal(number, handler)


class Distill(Command):
    def flags(self, output: Path, *more: str) -> Sequence[str]:
        return tiny_training.flags(self.root, output, *ONE_STEP, "--no_use_default_prompt", *more)


class Teacher(Command):
    def flags(self, output: Path, *more: str) -> Sequence[str]:
        return [
            "--pretrained_model_name_or_path", str(self.root / "sd3"), "--output_dir", str(output),
            "--default_embedding_dir", str(self.root / "default"), "--null_embedding_dir", str(self.root / "null"),
            "--train_batch_size", "2", "--mixed_precision", "no", "--sampling_steps", "1", *ONE_STEP, *more,
        ]  # fmt: skip


class Prepare(Command):
    def flags(self, output: Path, *more: str) -> Sequence[str]:
        return ["--hr_dir", str(self.root / "photos"), "--output_dir", str(output), "--min_size", "16",
                "--small_photos", "enlarge", "--dataloader_num_workers", "0", *more]  # fmt: skip


def upscaled(command: Command, said: str) -> Path:
    """Runs the printed command that upscales, and returns the path of its picture."""
    (words,) = printed(said)
    assert Path(words[1]).name == "upscale.py" and "1 upscaled" in command.obeys(words)
    return command.root / words[-1] / "a photo.png"


@pytest.mark.parametrize(
    ("flags", "lora"),
    [
        ((), "lora"),
        # 2026-11-28: passed in 25 s
        pytest.param(
            ("--hr_dir", "photos", "--crop_size", "32", "--use_default_prompt", "--ema_decay", "0.9"),
            "lora/ema",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_student_upscales(root, monkeypatch, capsys, flags, lora):
    """Trained on photographs or a set, with the default prompt or the images' own; a moving average is preferred."""
    command = Distill(distill.main, "train/distill.py", root, monkeypatch, capsys)
    said = command.done(root / "runs" / "a student", *flags)
    assert f"'runs/a student/checkpoint_0000001/{lora}'" in said and "--embedding_dir default" in said
    picture = upscaled(command, said)
    assert Image.open(picture).size == (96, 96) and picture.parent.name == "a student-upscaled"
    # Upscaling into the same folder again would skip the photograph, so the next hint names a new folder.
    again = distill.Options(
        pretrained_model_name_or_path="sd3",
        default_embedding_dir=root,
        output_dir=root / "runs" / "a student",
    )
    assert "a student-upscaled-2" in distill._how_to_use(again, root)


def test_a_missing_default_prompt_is_asked_for(root, monkeypatch, capsys):
    """A set with its own prompts trains without the default prompt, but upscaling needs it."""
    command = Distill(distill.main, "train/distill.py", root, monkeypatch, capsys)
    said = command.done(root / "run", "--default_embedding_dir", "new/default")
    assert "upscaling needs the default prompt's embedding in new/default" in said
    assert "sd3 has no text encoders to make it with" in said
    (words,) = printed(said)
    assert "--embedding_dir new/default" in shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--data_dir", "set"), ("--hr_dir", "photos", "--crop_size", "32", "--train", "base")]
)
def test_a_teacher_is_distilled_and_its_student_upscales(root, monkeypatch, capsys, flags):
    command = Teacher(teacher.main, "train/teacher.py", root, monkeypatch, capsys)
    said = command.done(root / "runs" / "teacher", *flags, "--ema_decay", "0.9")
    (words,) = printed(said)
    assert {"--train_batch_size", "--mixed_precision", "--null_embedding_dir", flags[0]} <= set(words)
    assert words[-2:] == ["--output_dir", "runs/teacher-distilled"] and ("--use_teacher_lora" in words) == (
        len(flags) == 2
    )
    upscaled(command, command.obeys(words))


@pytest.mark.slow
def test_a_prepared_set_is_trained_on(root, monkeypatch, capsys):
    """The empty prompt's embedding is beside the default prompt's."""
    command = Prepare(prepare.main, "train/prepare.py", root, monkeypatch, capsys)
    said = command.done(root / "sets" / "a set", *MODEL)
    (words,) = printed(said)
    assert "--null_embedding_dir null --lambda_lpips 0 --output_dir 'sets/a set-distilled'" in shlex.join(
        words
    )
    upscaled(command, command.obeys(words))


def test_a_missing_empty_prompt_is_asked_for(root, monkeypatch, capsys):
    shutil.move(root / "null", root / "elsewhere")
    command = Prepare(prepare.main, "train/prepare.py", root, monkeypatch, capsys)
    said = command.done(root / "set 2", *MODEL)
    assert "training needs the empty prompt's embedding in dataset/null. sd3 has no text encoders" in said
    (root / "sd3" / "text_encoder").mkdir()
    first, then = printed(command.done(root / "set 2", *MODEL))
    assert first[1:] == [str(CHECKOUT / "convert/prompts.py"), "--null", "--pretrained_model_name_or_path", "sd3",
                         "--output", "dataset/null"]  # fmt: skip
    assert "--null_embedding_dir dataset/null" in shlex.join(then)


# --- the bundled model ----------------------------------------------------------------------------


def link(root: Path) -> str:
    (root / "a link").symlink_to(FOLDER)
    return "a link"


@pytest.mark.parametrize("name", [lambda root: str(FOLDER), lambda root: os.path.relpath(FOLDER, root), link])
def test_the_bundled_model_brings_crops_and_prompts(root, monkeypatch, capsys, name):
    """For every spelling of its path; the printed command is complete."""
    command = Prepare(prepare.main, "train/prepare.py", root, monkeypatch, capsys)
    said = command.done(root / "made", "--pretrained_model_name_or_path", name(root))
    assert json.loads((root / "made/manifest.json").read_text())["settings"]["crop"]["height"] == 128
    (words,) = printed(said)
    assert f"--null_embedding_dir {FOLDER}/prompt/null --lambda_lpips 0" in shlex.join(words)


def test_a_lora_on_the_bundled_model_upscales_if_the_model_is_named(root, monkeypatch, capsys):
    from tsdsr_jax.models import lora
    from tsdsr_jax.weights.sd3_folder import open_checkpoint

    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        network = open_checkpoint(FOLDER).network(part)
        adapter = tiny.random_lora(network.load("float32"), targets, 2, 0, 0.01)
        tiny.save_peft(root / "lora" / f"{part}.safetensors", adapter, network.config)
    command = Command(upscale.main, "infer/upscale.py", root, monkeypatch, capsys)
    flags = (
        "--lora_dir",
        "lora",
        "--rank",
        "2",
        "--rank_vae",
        "2",
        "--process_size",
        "16",
        "-i",
        "../examples",
        "-o",
        "out",
    )
    outcome = command.typed("infer/upscale.py", "--pretrained_model_name_or_path", str(FOLDER), *flags)
    assert outcome.status == 0, outcome.err
    assert "merged in" not in outcome.out
    refused = command.typed("infer/upscale.py", *flags)
    assert refused.status == 1 and "give the model it belongs to" in refused.err


@pytest.mark.parametrize("train", ["lora", "base"])
def test_a_finished_student_is_no_base_for_a_teacher(root, monkeypatch, capsys, train):
    (root / "sd3" / MERGED_FILE).write_text('{"loras": ["a/transformer.safetensors"]}')
    command = Teacher(teacher.main, "train/teacher.py", root, monkeypatch, capsys)
    said = command.refused(root / "run", "--train", train, "--hr_dir", "photos")
    assert "sd3: is a finished one-step student" in said and said.count("\n") == 1
    (root / "sd3" / MERGED_FILE).write_text("[]")
    assert f"{MERGED_FILE}: expected a JSON object" in command.refused(root / "run", "--hr_dir", "photos")


def test_distilling_a_finished_student_prints_a_note(root, monkeypatch, capsys):
    (root / "sd3" / MERGED_FILE).write_text('{"loras": ["a/transformer.safetensors"]}')
    command = Distill(distill.main, "train/distill.py", root, monkeypatch, capsys)
    monkeypatch.setattr(distill, "_load_base", lambda *_: pytest.exit("far enough"))

    def notes(*flags: str) -> str:
        with pytest.raises(pytest.exit.Exception):
            command.typed("train/distill.py", *map(command.relative, command.flags(root / "run", *flags)))
        return capsys.readouterr().out

    assert "not a teacher for TSD; pass --lambda_tsd 0" in notes()
    assert "a teacher for TSD" not in notes("--lambda_tsd", "0")


# --- crops that fit -------------------------------------------------------------------------------


def test_crops_that_are_too_large_are_refused_with_a_size_that_fits(root, monkeypatch, capsys):
    command = Distill(distill.main, "train/distill.py", root, monkeypatch, capsys)
    config = json.loads((root / "sd3/transformer/config.json").read_text())
    (root / "sd3/transformer/config.json").write_text(json.dumps(config | {"pos_embed_max_size": 1}))
    said = command.refused(root / "run", "--hr_dir", "photos", "--crop_size", "32")
    assert "position table ends at 16: pass --crop_size 16" in said
    said = command.refused(root / "run")
    assert "position table ends at 16: prepare the set again with --crop_size 16" in said


def test_the_default_crop_agrees_with_the_same_one_given():
    from tsdsr_jax.data.options import DataOptions
    from tsdsr_jax.data.sources import crop_identity

    for longest, side in ((128, 128), (1536, 512)):
        given = DataOptions(crop_size=(side,))
        assert (
            crop_identity(DataOptions().fitted(longest))
            == crop_identity(given)
            == crop_identity(given.fitted(64))
        )
    assert DataOptions().crop().height == 512


# --- in a shell -----------------------------------------------------------------------------------


def shell(line: str, folder: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_from_photographs_to_pictures_through_the_shell(models, tmp_path):
    """Prepares a set with the bundled model, trains on it and upscales: three commands, two of them printed."""
    folder = shutil.copytree(models, tmp_path / "a folder")
    for photo in (folder / "photos").rglob("*.png"):
        Image.fromarray(tiny.synthetic_photo(128, 140, 0)).save(photo)
    script = shlex.join([hints.interpreter(), str(CHECKOUT / "train/prepare.py")])
    line = f"{script} --hr_dir photos --output_dir 'my set' --pretrained_model_name_or_path {FOLDER}"
    for word in ("train on it: ", "upscale with it: "):
        line = re.search(f"^{word}(.*)", shell(line, folder), re.MULTILINE)[1]
    shell(line, folder)
    assert len(list((folder / "my set-distilled-upscaled").glob("*.png"))) == 4


@pytest.mark.slow
def test_the_first_lines_of_the_readmes_training_part_work(tmp_path):
    section = (CHECKOUT / "README.md").read_text().partition("\n## Train\n")[2]
    block = re.search("```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    train, use = (
        line.replace("python ", f"{hints.interpreter()} ", 1) for line in block.strip().splitlines()
    )
    # In a folder with links to the checkout's files, so that results do not end up in the checkout.
    for name in ("train", "infer", "weights", "examples"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    output = shell(train, tmp_path)
    assert "upscale with it" in output
    shell(use, tmp_path)
    pictures = list(tmp_path.glob("runs/*/*.png"))
    assert any(np.asarray(Image.open(path)).std() > 10 for path in pictures)
