"""Training's programs compile for an NVIDIA GPU, with cuDNN's attention forward and backward. No GPU is needed.

With JAX's CUDA plugin (`make cuda-compiler`), XLA compiles for the description of an H200. This happens in a separate
process, because that of the tests has eight CPUs. See support/dry_run.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import planned_sd3
from tsdsr_jax.models.vae import VAEConfig

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(sys.prefix) / f"cuda-compiler-{jax.__version__}"
# `.ci/run` installs it. Elsewhere it would be a download of 140 MB for one test.
pytestmark = pytest.mark.skipif(
    not COMPILER.is_dir(), reason=f"JAX's CUDA plugin is not in {COMPILER}: make cuda-compiler"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of SD3-medium, a small autoencoder, and photographs of 512×512."""
    folder = tmp_path_factory.mktemp("described")
    small = VAEConfig.tiny(block_out_channels=(32, 32, 64, 64))
    planned_sd3.save(folder, planned_sd3.layers(3), small)
    (folder / "photos").mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{seed}.png")
    return folder


def programs(root: Path, script: str, *flags: str, **environment: str) -> list[dict[str, Any]]:
    """Returns the programs that a script compiles in a dry run."""
    command = [
        sys.executable, str(ROOT / "tests" / "support" / "dry_run.py"), script,
        "--pretrained_model_name_or_path", "sd3", "--default_embedding_dir", "default", "--null_embedding_dir", "null",
        "--hr_dir", "photos", "--max_train_steps", "2", "--train_batch_size", "2", "--output_dir", "run", *flags,
    ]  # fmt: skip
    paths = os.pathsep.join([str(COMPILER), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        cwd=root,
        env=os.environ | environment | {"PYTHONPATH": paths, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_a_training_step_compiles_with_cudnns_attention(root: Path):
    """The teacher's step: a gradient through three full-width layers with SD3's 1024 + 333 tokens, and the optimizer."""
    (step,) = (
        found for found in programs(root, "train/teacher.py", STEP_ONLY="1") if found.get("program") == "step"
    )
    # Two queries in each of two layers, and the image's in the last, which has no text output.
    assert step["attention"] >= 5 and step["attention backward"] == 5


@pytest.mark.slow  # 2026-11-28, two cores: 8 minutes
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train/distill.py", ("--lambda_lpips", "0", "--use_dasm", "--guidance_scale", "7.5")),
        (
            "train/distill.py",
            ("--lambda_lpips", "0", "--gradient_checkpointing", "--gradient_accumulation_steps", "2"),
        ),
        ("train/teacher.py", ("--train", "base", "--gradient_checkpointing", "--mixed_precision", "fp16")),
    ],
)
def test_whole_runs_compile(root: Path, script: str, flags: tuple[str, ...]):
    found = programs(root, script, *flags)
    assert sum(program.get("attention backward", 0) for program in found) >= 2
    assert all(
        program["attention"] for program in found if program.get("program") in ("step", "restore", "look")
    )
    assert "files" in found[-1]
