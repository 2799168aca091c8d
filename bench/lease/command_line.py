"""Times infer/upscale.py as it is typed, with random weights of SD3 and its LoRAs: cold, warm, and in eight bits.

Argument: full or tiny. Writes OUT/command_line.jsonl, one figure a line, and starts nothing more after END seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import packages
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT, WORK = Path(os.environ["OUT"]), Path(os.environ["WORK"])
PROGRAMS = WORK / "command_line_programs"
RESULTS = WORK / "command_line_results"


def main() -> None:
    started = time.monotonic()
    (size,) = sys.argv[1:]
    complaint = packages.complaint()
    if complaint:
        sys.exit(complaint)
    if not (WORK / "complete").exists() or (WORK / "complete").read_text() != size:
        make = [sys.executable, HERE / "coordinator.py", size, "model"]
        subprocess.run(make, env=os.environ | {"OUT": str(OUT / "model")}, check=True)
    for folder in (PROGRAMS, RESULTS):
        shutil.rmtree(folder, ignore_errors=True)
    with (OUT / "command_line.jsonl").open("w") as file:
        for figures in measured(size):
            figures = {"second": round(time.monotonic() - started, 1)} | figures
            print(json.dumps(figures), flush=True)
            file.write(json.dumps(figures) + "\n")
            file.flush()
            if time.monotonic() - started > float(os.environ["END"]):
                sys.exit("the time is over")


def measured(size: str) -> Iterator[dict[str, object]]:
    """All figures, the most important first."""
    folder, one, flags = WORK / "photos", WORK / "photos" / "00.png", model_flags(size)
    count = len(list(folder.iterdir()))
    yield upscaled(f"cold, {count} photographs", folder, flags)
    yield upscaled(f"warm, {count} photographs", folder, flags)
    yield upscaled("warm, one photograph", one, flags)
    yield first_picture("cold", "full")
    yield first_picture("warm", "full")
    for weights in ("fp8", "int8"):
        for when in ("cold", "warm"):
            yield upscaled(f"{when}, {count} photographs, {weights}", folder, [*flags, "--weights", weights])
    yield first_picture("warm", "fp8")
    for when in ("cold", "warm"):
        yield upscaled(f"{when}, one photograph, bundled model", one, [])


def upscaled(name: str, photos: Path, flags: list[object]) -> dict[str, object]:
    """The seconds of a command, and how far its files are from those of the first command."""
    target = RESULTS / name.replace(", ", "-").replace(" ", "-")
    told = run([ROOT / "infer" / "upscale.py", "-i", photos, "-o", target, *flags])
    if "failed" not in told and flags:
        told |= differences(next(RESULTS.glob("cold-*-photographs")), target)
    return {"command": name} | told


def first_picture(when: str, weights: str) -> dict[str, object]:
    """The phases of the first picture, in a process that compiles (cold) or finds programs on disk."""
    if when == "cold":
        shutil.rmtree(PROGRAMS)
    photo = WORK / "photos" / "00.png"
    told = run(
        [HERE / "first_picture.py", photo, WORK / "model", WORK / "adapters", WORK / "prompt", weights]
    )
    phases = json.loads(str(told.pop("last_line"))) if "failed" not in told else {}
    return {"first picture": f"{when}, {weights}"} | told | {"phases": phases}


def model_flags(size: str) -> list[object]:
    flags = ["--pretrained_model_name_or_path", WORK / "model", "--lora_dir", WORK / "adapters"]
    small = ["--rank", "4", "--rank_vae", "4", "--process_size", "64"] if size == "tiny" else []
    return [*flags, "--embedding_dir", WORK / "prompt", *small]


def run(command: list[object]) -> dict[str, object]:
    """Runs a Python script; its seconds and last line, or why it failed."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(PROGRAMS), "LEASE_STARTED": str(time.time())}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | own, capture_output=True, text=True, cwd=ROOT
    )
    seconds = round(time.perf_counter() - start, 2)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    return {"seconds": seconds} | ({"failed": lines[-1]} if done.returncode else {"last_line": lines[-1]})


def differences(wanted: Path, found: Path) -> dict[str, object]:
    """Gray levels between the files of two folders: root mean square, and the farthest."""
    pairs = [(pixels(wanted / file.name), pixels(file)) for file in sorted(found.glob("*.png"))]
    squares = [np.square(a - b).mean() for a, b in pairs]
    return {
        "rms_levels": round(float(np.sqrt(np.mean(squares))), 4),
        "farthest_levels": float(max(np.abs(a - b).max() for a, b in pairs)),
    }


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image, np.float32)


if __name__ == "__main__":
    main()
