"""The GPU's programs, compiled for a described H200: what makes them fast must not get lost unnoticed. No GPU is needed.

What `bench/gpu_plan.py` finds in the optimized programs of the full-size SD3 is compared with what was found when each was
last made faster. A bound that a better program no longer meets is to be lowered with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(sys.prefix) / f"cuda-compiler-{jax.__version__}"
# `.ci/run` installs it. Elsewhere it would be a download of 140 MB for these tests.
pytestmark = pytest.mark.skipif(
    not COMPILER.is_dir(), reason=f"JAX's CUDA plugin is not in {COMPILER}: make cuda-compiler"
)

# Room for other versions of XLA, and for changes that are not worth a test's failure.
SLACK = 1.1
# Traffic differs little from version to version; a map that is read once more is 3 % of the decoder's.
TRAFFIC_SLACK = 1.02


class Bound(NamedTuple):
    """What a program had.

    Attributes:
      kernels: launches.
      traffic: gigabytes from and to memory, per image.
      temporary: gigabytes that XLA plans beside arguments and results.
      attention: cuDNN's, forward and backward.
      copies: gigabytes of weights that are moved about per call, read and written. cuDNN wants the autoencoder's in another
        order; a linear layer's must not move.
    """

    kernels: int
    traffic: float
    temporary: float
    attention: tuple[int, int]
    copies: float = 0.0


# Eight images of 512×512 in float16.
INFERENCE = {
    "encode": Bound(244, 3.69, 1.61, (0, 0), 0.14),
    "transformer": Bound(435, 3.63, 0.23, (47, 0)),
    "decode": Bound(331, 6.32, 2.68, (0, 0), 0.2),
}
FP8 = Bound(529, 3.71, 0.21, (47, 0))
# Two images, three layers of full width, bfloat16.
GRADIENTS = {
    "student_gradient": Bound(580, 2.81, 0.37, (5, 5)),
    "auxiliary_gradient": Bound(380, 2.16, 0.33, (5, 5)),
}


def plans(folder: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Returns what the plan says of each program."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_plan.py"), "--json", "plan.json", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    rows = json.loads((folder / "plan.json").read_text())["rows"]
    return {row["program"]: row for row in rows}


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return plans(tmp_path_factory.mktemp("inference"))


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return plans(tmp_path_factory.mktemp("gradients"), "--layers", "3", "--programs", *GRADIENTS)


def check(plan: dict[str, Any], bound: Bound) -> None:
    assert (plan["attention"], plan["attention_backward"]) == bound.attention
    assert plan["float32_tflop"] == 0, "a product in float32"
    assert plan["weight_copies_gb"] <= SLACK * bound.copies, "weights are copied before they are used"
    assert plan["gb"] <= TRAFFIC_SLACK * bound.traffic, "more traffic"
    assert plan["kernels"] <= SLACK * bound.kernels, "more kernels"
    assert plan["temporary_gb"] <= SLACK * bound.temporary, "more memory"


@pytest.mark.parametrize("program", INFERENCE)
def test_inference(inference: dict[str, dict[str, Any]], program: str) -> None:
    check(inference[program], INFERENCE[program])


def test_fp8_computes_in_fp8(tmp_path: Path) -> None:
    plan = plans(tmp_path, "--programs", "transformer", "--weights", "fp8")["transformer"]
    check(plan, FP8)
    products = plan["tflop"] * 8 - plan["eight_bit_tflop"]
    assert products < 0.2 * plan["eight_bit_tflop"], (
        "attention and two layers are in 16 bits, and nothing else"
    )


@pytest.mark.parametrize("program", GRADIENTS)
def test_gradient(gradients: dict[str, dict[str, Any]], program: str) -> None:
    check(gradients[program], GRADIENTS[program])


@pytest.mark.slow
def test_checkpointing_saves_memory(tmp_path: Path) -> None:
    """XLA must not take a block's recomputation for its first computation."""
    flags = "--layers", "6", "--programs", "student_gradient"
    kept, recomputed = (
        plans(tmp_path, *flags, f"--{no}gradient_checkpointing")["student_gradient"] for no in ("no_", "")
    )
    assert recomputed["temporary_gb"] < 0.6 * kept["temporary_gb"]
    assert recomputed["attention"] == 2 * kept["attention"]
