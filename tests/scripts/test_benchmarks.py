"""Runs every script in bench/ at its smallest size; each prints figures and refuses to compare results that differ."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_checkpoint as tiny
from tsdsr_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "tiny", "--device", "cpu")
# Passed on 26 November 2026, in 194 s.
slow = pytest.mark.slow


def bench(name: str, *flags: str | Path) -> tuple[int, str]:
    """Exit status, and what it printed."""
    command = [sys.executable, ROOT / "bench" / f"{name}.py", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def both_sides() -> None:
    """Skips if packages that PyTorch's side needs are missing."""
    for package in ("torch", "diffusers", "peft"):
        pytest.importorskip(package)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index % 2}").mkdir(exist_ok=True)
        Image.fromarray(tiny.synthetic_photo(32, 32, index)).save(
            folder / f"{index % 2}" / f"{index // 2}.png"
        )
    return folder


def test_host(tmp_path: Path, photos: Path) -> None:
    flags = ("--repeat", "1", "--formats", "png", "--json", tmp_path / "told.json")
    status, told = bench("host", "--photos", photos, *flags)
    assert status == 0 and re.search(r"png: [\d.]+ images per second on one core", told)
    (row,) = json.loads((tmp_path / "told.json").read_text())["rows"]
    assert row["cores_per_gpu"] == pytest.approx(1000 / 12 / row["images_per_second_and_core"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(side=100), "--side 100: expected a multiple of 16"),
        (dict(side=1024), "takes at most 512 in one tile"),
        (dict(batch=(1, 0)), "--batch: expected at least 1"),
        (dict(device="cuda"), "PyTorch sees no GPU"),
    ],
)
@pytest.mark.usefixtures("both_sides")
def test_flags_of_inference(changed: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import inference

    monkeypatch.setattr(inference.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        inference.check(inference.Options(**dict(size="tiny", device="cpu") | changed))


@pytest.mark.usefixtures("both_sides")
def test_inference(tmp_path: Path) -> None:
    flags = ("--side", "64", "--seconds", "0", "--parts", "encode", "--parts", "end", "--against", "eager")
    status, told = bench("inference", *SMALL, *flags, "--json", tmp_path / "told.json")
    assert status == 0 and re.search(r"end +batch 1: .*; eager [\d.]+ \(", told)
    found = json.loads((tmp_path / "told.json").read_text())
    encode, end = found["rows"]
    assert 0 < found["apart"] < 1e-3 and found["weights"]["ours"] < found["weights"]["torch"]
    assert encode["ratio_eager"] == pytest.approx(np.median(encode["eager"]) / np.median(encode["ours"]))
    # At least a feature map of 16 channels; all maps together would take tens of times as much.
    assert 64 * 64 * 16 * 4 <= encode["memory"]["ours"] < 64 * 64 * 16 * 4 * 16
    assert end["tflop"] > encode["tflop"] > 0 and end["memory"] == {}


@slow
@pytest.mark.usefixtures("both_sides")
def test_results_that_differ_are_not_compared() -> None:
    code = (
        "import sys; sys.path.insert(0, 'bench'); import inference; inference.FARTHEST['fp32'] = 1e-9; "
        "from tsdsr_jax import cli; cli.run(inference.main)"
    )
    flags = (*SMALL, "--side", "64", "--parts", "encode", "--against", "eager")
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "from PyTorch's result; expected at most 1e-09" in done.stderr
    assert "ratio" not in done.stdout


def test_start_up(tmp_path: Path, photos: Path) -> None:
    status, told = bench(
        "start_up", "-i", photos, "-o", tmp_path / "out", "--device", "cpu", "--process_size", "64"
    )
    assert status == 0 and "3 upscaled" in told
    rows = dict(re.findall(r"^ *(\S.*?) +[\d.]+ +([\d.]+)", told, re.MULTILINE))
    assert {
        "importing",
        "loading",
        "compiling beside the loading",
        "the first batch",
        "in all",
    } <= rows.keys()
    assert sum(float(rows[name]) for name in ("importing", "loading", "the first batch")) <= float(
        rows["in all"]
    )


@slow
@pytest.mark.usefixtures("both_sides")
def test_first_image() -> None:
    status, told = bench("first_image", *SMALL, "--against", "eager")
    assert status == 0 and re.search(r"eager: cold +[\d.]+ s, warm +[\d.]+ s  \(ratio", told)
    assert float(re.search(r"at most ([\d.]+) gray levels", told)[1]) <= 0.2


@slow
@pytest.mark.usefixtures("both_sides")
def test_whole_folder(photos: Path) -> None:
    status, told = bench("whole_folder", "--photos", photos, "--process_size", "128")
    assert status == 0 and re.search(r"3 files to files: [\d.]+ s, with compilation", told)


@slow
@pytest.mark.parametrize(
    "more", [(), ("--no_use_dasm", "--gradient_checkpointing")], ids=["dasm", "one point"]
)
@pytest.mark.usefixtures("both_sides")
def test_training(tmp_path: Path, more: tuple[str, ...]) -> None:
    flags = [
        *["--side", "64", "--batch", "1", "--rank", "4", "--seconds", "0", "--json"],
        tmp_path / "told.json",
    ]
    status, told = bench("training", *SMALL, *flags, *more)
    assert status == 0 and "ms per step" in told
    found = json.loads((tmp_path / "told.json").read_text())
    assert found["apart"] < 1e-3 and found["memory"]["ours_gb"] > 0


@slow
@pytest.mark.usefixtures("both_sides")
def test_merging() -> None:
    """An adapter's change survives beside the weights; merged in bfloat16, a small change does not."""
    status, told = bench(
        "merging", *SMALL, *["--side", "64", "--batch", "1", "--rank", "4", "--seconds", "0", "--std", "1e-5"]
    )
    beside, merged = map(float, re.search(r"kept (-?[\d.]+) beside, (-?[\d.]+) merged", told).groups())
    assert status == 0 and beside > 0.95 and merged < 0.5


@slow
def test_inference_memory(tmp_path: Path) -> None:
    status, _ = bench("inference_memory", "--side", "512", "--band", "256", "--json", tmp_path / "told.json")
    taken = {
        row["what"].strip(): row["gb"] for row in json.loads((tmp_path / "told.json").read_text())["rows"]
    }
    assert status == 0 and taken["transformer, int8"] < 0.3 * taken["transformer, fp32"]
    assert taken["decode 512², whole"] < taken["512² whole where there are"]
