"""Measures the size of a training set and how fast it is read, in both layouts and as the PyTorch original reads it.

    python bench/set_layouts.py --photos FOLDER            # one prompt for all, and one prompt each
    python bench/set_layouts.py --photos FOLDER --size 256 --samples 200

The code behind train/prepare.py writes the sets, with random latents and embeddings in SD3's shapes. One thread reads them
in random order, and the layouts alternate within each round. The files are in the system's cache, so that decoding is
measured, not the disk. The original's way (Pillow and torch.load) needs torch.
"""

from __future__ import annotations

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tsdsr_jax import cli
from tsdsr_jax.cli import Share
from tsdsr_jax.data.crops import Pairs, Planned, SetLayout
from tsdsr_jax.data.degradation import DegradationConfig
from tsdsr_jax.data.manifest_writer import ManifestWriter
from tsdsr_jax.data.photos import CropConfig, Photographs
from tsdsr_jax.data.set_prompts import Prompts
from tsdsr_jax.data.sources import look_at, open_sets
from tsdsr_jax.data.writers import FinishedSample, SetPlan, make_writer
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.prompt_files import PromptEmbeds

try:
    import torch
except ImportError:
    torch = None

TOKENS, WIDTH, POOLED, CHANNELS, FACTOR = 333, 4096, 2048, 16, 8


@dataclasses.dataclass(frozen=True)
class Options:
    photos: Path
    """Folder of photographs."""
    size: int = 512
    """Side of the samples."""
    samples: int = 64
    """Samples per set."""
    rounds: int = 3
    """Rounds; medians over them are shown."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    cli.at_least(options, 1, "samples", "rounds")
    if options.size < 16 or options.size % 16:
        raise UserError(f"--size {options.size}: expected a multiple of 16")
    cv2.setNumThreads(1)
    if torch:
        torch.set_num_threads(1)
    crop = CropConfig(options.size, options.size, 1)
    photographs = look_at([options.photos], crop, print).photographs
    source = Photographs(photographs, crop, DegradationConfig(), 0)
    figures = {}
    for prompts in ("one prompt for all", "one prompt each"):
        with tempfile.TemporaryDirectory() as folder:
            figures[prompts] = compare(options, source, prompts == "one prompt each", Path(folder))
        print(f"\n{options.samples} samples of {options.size}×{options.size}, {prompts}")
        print(f"{'':24} {'MB/sample':>10} {'samples/s':>10} {'against the original':>21}")
        base = figures[prompts].get("the original's reading", {}).get("rate")
        for name, found in figures[prompts].items():
            ratio = f"{found['rate'] / base:21.2f}" if base else f"{'-':>21}"
            print(f"{name:24} {found['megabytes']:10.2f} {found['rate']:10.1f} {ratio}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(
    options: Options, source: Photographs, own_prompts: bool, folder: Path
) -> dict[str, dict[str, float]]:
    for layout in ("shards", "folders"):
        write(options, source, own_prompts, layout, folder / layout)
    readers: dict[str, Callable[[int], object]] = {
        "shards": open_sets([folder / "shards"]).read,
        "folders": open_sets([folder / "folders"]).read,
    }
    if torch:
        readers["the original's reading"] = lambda index: read_as_original(folder / "folders", index)
    order = np.random.default_rng(0).permutation(options.samples)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds):
        for name, read in readers.items():
            start = time.perf_counter()
            for index in order:
                read(int(index))
            rates[name].append(options.samples / (time.perf_counter() - start))
    sizes = {name: megabytes(folder / ("shards" if name == "shards" else "folders")) for name in readers}
    return {
        name: {"megabytes": sizes[name] / options.samples, "rate": statistics.median(rates[name])}
        for name in readers
    }


def write(options: Options, source: Photographs, own_prompts: bool, layout: SetLayout, root: Path) -> None:
    """Writes a set with the library's writers."""
    texts = [f"prompt {index}" for index in range(options.samples if own_prompts else 1)]
    of = [index if own_prompts else 0 for index in range(options.samples)]
    samples = [Planned(index % len(source), index // len(source), None) for index in range(options.samples)]
    plan = SetPlan([f"sample {index}" for index in range(options.samples)], of, Prompts(texts, of))
    manifest = ManifestWriter(root, layout, {}, Share(0, 1))
    manifest.begin()
    writer = make_writer(layout, root, plan, Share(0, 1), per_file=256)
    writer.write_prompts(lambda texts: [random_prompt(text) for text in texts], lambda count: None)
    side = options.size // FACTOR
    for index, pair in enumerate(Pairs(source, samples, layout)):
        if pair.problem:
            raise UserError(pair.problem)
        latent = np.random.default_rng(index).standard_normal((side, side, CHANNELS), np.float32)
        writer.add(FinishedSample(index, pair.lr.tobytes(), pair.hr.tobytes(), latent, ""))
    writer.close()
    manifest.add_latents(writer, {})


def random_prompt(text: str) -> PromptEmbeds:
    generator = np.random.default_rng(len(text))
    prompt, pooled = generator.standard_normal((TOKENS, WIDTH), np.float32), generator.standard_normal(POOLED)
    return PromptEmbeds(prompt.astype(np.float16), pooled.astype(np.float16))


def read_as_original(root: Path, index: int) -> Mapping[str, object]:
    """Reads one file per kind, as a PyTorch dataset would."""
    name = f"{index + 1:07d}"

    def image(kind: str) -> object:
        pixels = np.array(Image.open(root / kind / f"{name}.png").convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def tensor(kind: str) -> object:
        return torch.load(root / kind / f"{name}.pt", weights_only=True).squeeze(0)

    kinds = {kind: image(kind) for kind in ("gt", "lr_bicubic")}
    return kinds | {kind: tensor(kind) for kind in ("latent_hr", "prompt_embeds", "pool_embeds")}


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    cli.run(main)
