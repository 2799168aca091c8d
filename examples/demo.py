"""Upscales the example photographs by four with the bundled model, and shows the results beside bicubic interpolation.

make demo        (or: python examples/demo.py)
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from tsdsr_jax import hints
from tsdsr_jax.images.files import IMAGE_SUFFIXES
from tsdsr_jax.images.sheet import comparison_sheet

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "examples" / "photos"
OUTPUT = ROOT / "demo"


def main() -> None:
    start = time.monotonic()
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix in IMAGE_SUFFIXES)
    print(
        f"Upscaling {len(photos)} small photographs by four with the bundled model. The first time takes one to two minutes "
        "on two cores, most of it for compiling; later times less than a minute."
    )
    run(
        "infer/upscale.py",
        "-i",
        PHOTOS,
        "-o",
        OUTPUT / "results",
        "--overwrite",
        "--report",
        OUTPUT / "report.html",
    )
    sheet = comparison_sheet([compare(path) for path in photos], ["input", "bicubic", "result"])
    sheet.save(OUTPUT / "comparison.png")
    print(f"Look at {OUTPUT / 'comparison.png'}, or at {OUTPUT / 'report.html'} in a browser", end="")
    print(f"  ({time.monotonic() - start:.0f} s)")


def run(script: str, *arguments: object) -> None:
    """Prints a command with one of the project's scripts, and runs it."""
    words = [ROOT / script, *arguments]
    print(f"$ {shlex.join([hints.interpreter(), *map(hints.shown, words)])}", flush=True)
    result = subprocess.run([sys.executable, *map(str, words)])
    if result.returncode:
        sys.exit(f"{script} failed")


def compare(path: Path) -> list[Image.Image]:
    photo = Image.open(path).convert("RGB")
    bicubic = photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC)
    return [photo, bicubic, Image.open(OUTPUT / "results" / f"{path.stem}.png")]


if __name__ == "__main__":
    main()
