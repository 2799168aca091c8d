"""Runs every script in bench/ at its smallest size; each prints figures and refuses to compare results that differ."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_checkpoint as tiny
from tsdsr_jax.commands.distill import Options as DistillOptions
from tsdsr_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "tiny", "--device", "cpu")
# Passed on 26 November 2026, in 194 s; the lease's came later.
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


def test_tsd_is_exact_in_the_precision_that_distill_uses() -> None:
    status, told = bench("tsd_precision", "--size", "tiny")
    off = {name: float(share) for name, share in re.findall(r"(fp16|bf16): ([\d.]+) % off", told)}
    assert status == 0 and off[DistillOptions.mixed_precision] < 4 < 8 < off["bf16"]


@slow
def test_sums_over_devices_lose_less_than_16_bits_do() -> None:
    status, told = bench("gradient_sums", "--devices", "3", "--batch", "1", "--side", "16", "--rank", "4")
    numbers = {
        name: list(map(float, re.findall(r"([\d.]+) %", line)))
        for name, line in re.findall(r"3 devices, (fp16|bf16): (.*)", told)
    }
    assert status == 0
    for name, tolerance in (("fp16", 0.5), ("bf16", 4)):
        half, wide, between = numbers[name]
        assert 0 < between < 0.6 * wide and wide <= half < tolerance


@slow
def test_eight_bits(photos: Path) -> None:
    status, told = bench("eight_bits", "--photos", photos, "--tiles", "2")
    velocities = dict(re.findall(r"(int8|fp8) velocities: ([\d.]+)", told))
    assert status == 0 and len(re.findall(r"fp8 .*png: [\d.]+ dB", told)) == 3
    assert 0 < float(velocities["int8"]) < 0.02 < float(velocities["fp8"]) < 0.06
    assert all(float(share) <= 1 for share in re.findall(r"inputs up to ([\d.]+)", told))


@slow
def test_inference_memory(tmp_path: Path) -> None:
    status, _ = bench("inference_memory", "--side", "512", "--band", "256", "--json", tmp_path / "told.json")
    taken = {
        row["what"].strip(): row["gb"] for row in json.loads((tmp_path / "told.json").read_text())["rows"]
    }
    assert status == 0 and taken["transformer, int8"] < 0.3 * taken["transformer, fp32"]
    assert taken["decode 512², whole"] < taken["512² whole where there are"]


@pytest.fixture
def lease(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a script of bench/lease in a copy of what git knows, as on a machine that has nothing else."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)

    def run(script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        own = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "PYTHONPATH": ""} | variables
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", f"tree/bench/lease/{script}.sh", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | own | {"PATH": path}, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


def figures(folder: Path, name: str = "results") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


@slow
@pytest.mark.usefixtures("both_sides")
def test_lease(tmp_path: Path, lease: Callable[..., tuple[int, str]]) -> None:
    """Ours and PyTorch's agree, and only one measures at a time. 2026-11-28: 12 min on a busy machine."""
    status, told = lease("run", "tiny", "ours", "eager", "fp8", "train", "torch-train")
    assert status == 0, told
    rows = figures(tmp_path)
    assert not [row for row in rows if "failed" in row], told
    apart = {(row["worker"], row["part"], row["batch"]): row["apart"] for row in rows if "apart" in row}
    assert {key[1:] for key in apart} == {
        (part, n) for part in ("encode", "transformer", "decode", "end") for n in (1, 2)
    }
    assert max(value for key, value in apart.items() if key[0] == "ours") < 1e-3
    assert 0 < apart["fp8", "transformer", 2] < 0.15
    assert re.search(r"\| encode, 2 at a time \| [\d.]+ \| \d+ % \| [\d.]+ \(\*\*[\d.]+×\*\*\)", told)
    losses = {row["worker"]: row["losses"] for row in rows if "losses" in row}
    for name, value in losses["torch-train"].items():
        assert losses["train"][name] == pytest.approx(value, rel=1e-3)
    turns = sorted((row["second"] - row["seconds"], row["second"]) for row in rows if "turn" in row)
    assert all(begun >= ended - 0.2 for (_, ended), (begun, _) in itertools.pairwise(turns))
    assert not (tmp_path / "tree" / "results.jsonl").exists() and (tmp_path / "out" / "logs.tar.gz").exists()


@slow
@pytest.mark.usefixtures("both_sides")
def test_a_lease_names_what_was_not_measured(tmp_path: Path, lease: Callable[..., tuple[int, str]]) -> None:
    status, told = lease("run", "tiny", "eager", "lora", DEADLINE="0", END="300")
    assert status == 0 and re.search(r"- model: not ready after 0 s", told)
    assert "- eager: not ready" in told and "- lora: not started" in told
    broken = tmp_path / "tree" / "bench" / "torch_parts.py"
    broken.write_text("raise SystemExit('no PyTorch today')\n")
    status, told = lease("run", "tiny", "eager")
    assert status == 0 and "- eager: exit status 1: no PyTorch today" in told


def test_a_lease_names_missing_packages(lease: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "tree" / "bench" / "lease" / "packages.py").write_text(
        (ROOT / "bench" / "lease" / "packages.py").read_text().replace('"tyro"', '"not_there"')
    )
    for script in ("run", "cli"):
        status, told = lease(script, "tiny")
        assert status == 1 and told.startswith("missing packages: not_there; bench/lease/README.md says")
    status, told = lease("run", "huge")
    assert status == 2 and "full|tiny" in told


@slow
@pytest.mark.usefixtures("both_sides")
def test_lease_of_the_command_line(tmp_path: Path, lease: Callable[..., tuple[int, str]]) -> None:
    """Passed on 28 November 2026, in 23 min on a machine with six times more to do than cores."""
    status, told = lease("cli", "tiny")
    assert status == 0, told
    rows = figures(tmp_path, "command_line")
    assert not [row for row in rows if "failed" in row], told
    commands = {row["command"]: row for row in rows if "command" in row}
    assert commands["warm, 3 photographs"]["farthest_levels"] == 0
    assert 0 < commands["cold, 3 photographs, fp8"]["rms_levels"] < 20
    assert (
        commands["warm, 3 photographs, fp8"]["rms_levels"]
        == commands["cold, 3 photographs, fp8"]["rms_levels"]
    )
    phases = {row["first picture"]: row["phases"] for row in rows if "first picture" in row}
    assert phases["warm, full"]["second picture"] < phases["cold, full"]["first picture"]


def test_a_leases_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios, the share of the peak, results that differ, and jobs that failed."""
    monkeypatch.syspath_prepend(ROOT / "bench" / "lease")
    import table

    card = {"name": "NVIDIA X", "driver_version": "1"}
    rows = [
        {"worker": "coordinator", "machine": card, "size": "full", "versions": {"jax": "0.11.2"}},
        {"worker": "ours", "tflop_per_image": {"encode": 1.0}},
        {"worker": "ours", "part": "encode", "batch": 8, "ms": 2.0},
        {"worker": "eager", "part": "encode", "batch": 8, "ms": 6.0},
        {"worker": "compiled", "part": "encode", "batch": 8, "ms": 1.5},
        {"worker": "ours", "matmul_tflops": 800.0, "copy_gb_s": 4000.0},
        {"worker": "train", "part": "step", "batch": 2, "ms": 50.0, "memory_gb": 18.0},
        {"worker": "torch-train", "part": "step", "batch": 2, "ms": 110.0},
        {"worker": "train", "losses": {"tsd": 1.0}}, {"worker": "torch-train", "losses": {"tsd": 2.0}},
        {"worker": "lora", "failed": "not ready after 400 s"},
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for worker, value in (("eager", 1.0), ("ours", 1.01)):
        (tmp_path / "outputs" / worker).mkdir(parents=True)
        np.save(tmp_path / "outputs" / worker / "encode-8.npy", np.full((8, 2, 2, 1), value, np.float32))
    told = table.render(results, tmp_path / "outputs")
    assert "| encode, 8 at a time | 2.00 | 62 % | 6.00 (**3.00×**) | 1.50 (**0.75×**) | – | 1.0e-02 |" in told
    assert (
        "| without gradient checkpointing | 50.0 | 110.00 (**2.20×**) | 18.0 | – | – | 5.0e-01, **TOO FAR** |"
        in told
    )
    assert "- lora: not ready after 400 s" in told
    assert table.render(results).count("1.0e-02") == 1  # kept in the file
