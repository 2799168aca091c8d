"""What upscaling expects a picture to take on a GPU, against XLA's plan for the description of an H200."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tsdsr_jax.models.vae import VAEConfig, whole_image_bytes

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(sys.prefix) / f"cuda-compiler-{jax.__version__}"
pytestmark = pytest.mark.skipif(
    not COMPILER.is_dir(), reason=f"JAX's CUDA plugin is not in {COMPILER}: make cuda-compiler"
)


def test_a_whole_picture_takes_a_little_less_than_expected(tmp_path: Path):
    target = tmp_path / "plan.json"
    command = [
        sys.executable, str(ROOT / "bench" / "gpu_plan.py"), "--programs", "decode", "--batch", "1", "--size", "1024",
        "--json", str(target),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    (decode,) = (row["temporary_gb"] for row in json.loads(target.read_text())["rows"])
    expected = whole_image_bytes(VAEConfig.sd3(), jnp.float16, "gpu") * 1024**2 / 1e9
    assert decode <= expected <= 1.35 * decode
