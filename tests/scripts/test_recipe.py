"""Runs all stages of train/recipes/tiny.sh at the smallest budget, from photographs to a model that upscales."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tiny_training
from tsdsr_jax.training.log import read_rows

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny.sh"


def recipe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["env", f"PYTHON={sys.executable}", str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=1500)


@pytest.mark.slow
def test_from_photographs_to_an_upscaled_picture(tmp_path):
    """Five minutes on two quiet cores, 14 on busy ones; 2026-11-29: passed."""
    photos = tiny_training.save_photos(tmp_path / "photos", 4, (144, 160))
    given = ("--photos", photos, "--validation", photos, "--output", tmp_path / "runs", "--student", "full")
    made = recipe(*given, "--budget", "minimal")
    assert made.returncode == 0, made.stderr
    model = tmp_path / "runs" / "model-full-0"
    assert {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()} == {
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
        "lora/transformer.safetensors", "lora/vae.safetensors", "teacher/teacher.safetensors",
        "prompt/default/prompt.safetensors", "prompt/null/prompt.safetensors",
    }  # fmt: skip
    stages = {
        "autoencoder",
        "large",
        "new",
        "pairs-0",
        "base",
        "teacher",
        "start",
        "student-full-0",
        "model-full-0",
        "recipe",
    }
    assert {path.name for path in (tmp_path / "runs").iterdir()} == stages

    # The default shares every stage but the last.
    pixel = recipe(*given[:-2], "--budget", "minimal")
    assert pixel.returncode == 0, pixel.stderr
    assert (tmp_path / "runs/model-pixel-0/lora/transformer.safetensors").is_file()
    rows = read_rows(tmp_path / "runs/student-pixel-0/log.jsonl")
    assert any("pixel" in row for row in rows) and not any("auxiliary" in row for row in rows)

    again = recipe(*given, "--budget", "minimal")
    assert again.returncode == 0 and "step 2/2" in made.stdout and "step 2/2" not in again.stdout
    other = recipe(*given, "--budget", "cpu")
    assert other.returncode == 2 and "choose another --output" in other.stderr

    command = [
        sys.executable,
        "infer/upscale.py",
        "--pretrained_model_name_or_path",
        model,
        "--lora_dir",
        model / "lora",
    ]
    command += ["--embedding_dir", model / "prompt/default", "--process_size", "16"]
    command += ["-i", ROOT / "examples/photos/coffee.png", "-o", tmp_path / "results"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    assert Image.open(tmp_path / "results" / "coffee.png").size == (512, 512)


GIVEN = ("--photos", "infer", "--validation", "train", "--output", "/dev/null/b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --photos"),
        (("--photo", "x"), "--photo: no such flag"),
        (("--photos",), "--photos: needs a value"),
        (("--photos", "nowhere"), "--photos nowhere: no such folder"),
        (
            ("--photos", "infer", "--validation", "train", "--output", "train/new"),
            "lies in the photographs of",
        ),
        ((*GIVEN, "--budget", "tpu"), "--budget tpu: expected"),
        ((*GIVEN, "--student", "x"), "--student x: expected"),
        ((*GIVEN, "--seed", "x"), "--seed x: expected"),
    ],
)
def test_mistakes_are_told(arguments, message):
    failed = recipe(*arguments)
    assert failed.returncode == 2 and message in failed.stderr
