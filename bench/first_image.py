"""Measures the time from the command to the first file, ours against PyTorch, each in its own processes.

    python bench/first_image.py --size tiny --device cpu
    python bench/first_image.py                          # SD3-medium on a GPU; needs 9 GB of disk

`cold` compiles; `warm` finds programs on disk that an earlier process compiled. Both sides read the same diffusers folder
with random weights, upscale one photograph of 128×128 by a factor of four and write a PNG. PyTorch runs `eager` and
`compiled`, with its own cache on disk, which is cold or warm like ours. The files must agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import timing
import torch
from PIL import Image
from torch_networks import TorchNetworks, numpy_of
from torch_pipeline import DTYPES

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "examples" / "photos" / "cat.png"
SIDE = 128
# Mean difference of the files, in gray levels: half precision rounds after every layer.
FARTHEST = {"fp32": 0.2, "fp16": 1.0, "bf16": 4.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "half", "full"] = "full"
    """Size of both networks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device for both frameworks."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Default: fp16 on a GPU, fp32 on a CPU."""
    against: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """PyTorch's ways to run; repeat for several."""
    folder: Path | None = None
    """Folder for the model while this runs. Default: the system's folder for temporary files."""
    json: Path | None = None
    """JSON file for the results."""

    @property
    def precision(self) -> str:
        return self.mixed_precision or ("fp32" if self.device == "cpu" else "fp16")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; --device cpu runs the small sizes")
    if options.folder and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder")
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        work = Path(made)
        save_model(options, work)
        seconds = {side: [run(options, work, side, name) for name in ("cold", "warm")]
                   for side in ("ours", *options.against)}  # fmt: skip
        apart = {side: difference(work, side) for side in options.against}
    for side, (cold, warm) in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip((cold, warm), seconds["ours"], strict=True)]
        line = "" if side == "ours" else f"  (ratio {ratios[0]:.2f}, {ratios[1]:.2f})"
        print(f"{side:>9}: cold {cold:6.1f} s, warm {warm:6.1f} s{line}")
    farthest = max(apart.values(), default=0.0)
    print(f"files at most {farthest:.2f} gray levels apart on average")
    if not farthest <= FARTHEST[options.precision]:
        raise UserError(
            f"expected at most {FARTHEST[options.precision]:g}: the two sides do not compute the same"
        )
    if options.json:
        found = {"size": options.size, "precision": options.precision, "seconds": seconds, "apart": apart}
        found["versions"] = timing.versions("torch", "diffusers")
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def save_model(options: Options, work: Path) -> None:
    """`work/sd3` (diffusers), `work/prompt`, `work/photo.png`."""
    networks = TorchNetworks.random(options.size, "cpu", DTYPES[options.precision])
    networks.transformer.save_pretrained(work / "sd3" / "transformer")
    networks.vae.save_pretrained(work / "sd3" / "vae")
    save_prompt_embeds(work / "prompt", PromptEmbeds(*(numpy_of(part[0].float()) for part in networks.text)))
    Image.open(PHOTO).convert("RGB").crop((0, 0, SIDE, SIDE)).save(work / "photo.png")


def run(options: Options, work: Path, side: str, name: str) -> float:
    """Seconds that one process takes; each side has its own caches of compiled programs."""
    target = work / f"{side}-{name}"
    command: list[str | Path]
    if side == "ours":
        command = [
            ROOT / "infer" / "upscale.py", "--pretrained_model_name_or_path", work / "sd3", "--lora_dir", "none",
            "--embedding_dir", work / "prompt", "-i", work / "photo.png", "-o", target, "--latent", "mode",
            "--device", options.device, "--mixed_precision", options.precision,
        ]  # fmt: skip
    else:
        command = [
            Path(__file__).with_name("torch_first_image.py"), work, target, options.device, options.precision, side,
        ]  # fmt: skip
    caches = {
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache-ours"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / f"cache-{side}"),
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | caches, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{side}: failed\n{last_lines(done.stderr)}")
    return seconds


def last_lines(text: str, count: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


def difference(work: Path, side: str) -> float:
    return max(
        float(np.abs(pixels(work / f"ours-{name}") - pixels(work / f"{side}-{name}")).mean())
        for name in ("cold", "warm")
    )


def pixels(folder: Path) -> np.ndarray:
    with Image.open(folder / "photo.png") as image:
        return np.asarray(image, np.float32)


if __name__ == "__main__":
    cli.run(main)
