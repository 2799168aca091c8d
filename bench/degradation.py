"""Measures degraded samples per second and core, against a straightforward PyTorch version of the same stages.

    python bench/degradation.py                                   # synthetic photographs, 512×512
    python bench/degradation.py --photos FOLDER --size 256        # crops of photographs; reading them counts, too

Both versions process one sample at a time on one thread, with the same random choices: kernels, factors, modes, strengths,
qualities. They alternate within each round. Times are the process's CPU time, which a busy machine distorts least and which
excludes waiting for a disk. First, the two are compared, without noise and in their noise; if they differ, nothing is timed.
The PyTorch version needs torch (the `convert` extra).
"""

from __future__ import annotations

if __name__ == "__main__":
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The libraries read these when they load.
    os.environ |= dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
    )

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np

from tsdsr_jax import cli
from tsdsr_jax.data import degradation
from tsdsr_jax.data.degradation import DegradationConfig, DegradedPair, Mode, Order, Range
from tsdsr_jax.data.jpeg_model import CHROMA, LUMA
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import read_photo
from tsdsr_jax.images.resize import reflect_pad
from tsdsr_jax.images.search import find_photographs

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

MAX_PIXELS = 64_000_000
# PyTorch cannot mirror more pixels than an image has: 10, after shrinking to 0.15 of the side.
SMALLEST = 80
# Mean absolute difference of a sample, in gray levels. Ties between coefficients may round either way.
TOLERANCE = 0.05
NOISE_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    size: int = 512
    """Side of the samples."""
    samples: int = 40
    """Samples of each version in each round."""
    rounds: int = 3
    """Rounds; medians over them are shown."""
    photos: Path | None = None
    """Folder of photographs to crop. Default: synthetic photographs."""
    check: int = 8
    """Samples to compare before measuring."""
    steps_per_second: float = 5.0
    """Steps per second of the training that needs the samples."""
    batch: int = 2
    """Samples per step."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    config = DegradationConfig()
    for flag in ("samples", "rounds", "check", "batch", "steps_per_second"):
        if getattr(options, flag) <= 0:
            raise UserError(f"--{flag} {getattr(options, flag)}: expected more than 0")
    if options.size < SMALLEST or options.size % config.scale:
        raise UserError(f"--size {options.size}: expected a multiple of {config.scale}, at least {SMALLEST}")
    if torch is None:
        raise UserError("the comparison needs PyTorch; install it with: pip install 'tsdsr_jax[convert]'")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    photos, read_s = crops(options) if options.photos else (synthetic(options), 0.0)
    source = f"photographs of {options.photos}" if options.photos else "synthetic photographs"
    print(
        f"{options.size}×{options.size}, {source}, {options.rounds} rounds of {options.samples} samples;"
        f" numpy {np.__version__}, opencv {cv2.__version__}, torch {torch.__version__}"
    )
    theirs = TorchDegradation(config)
    levels, noise = compare(photos, config, options.check)
    print(
        f"compared on {options.check} samples: {levels:.4f} gray levels apart at most (means over a sample, no noise),"
        f" noise {noise:.1%}"
    )

    rates = measure(photos, {"ours": degradation.degrade, "torch": theirs.degrade}, options)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [ours / torchs for ours, torchs in zip(rates["ours"], rates["torch"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"\n{'':14} {'samples/s/core':>14} {'ms':>8}   lowest and highest round")
    for name, values in rates.items():
        print(
            f"{name:14} {middle[name]:14.2f} {1000 / middle[name]:8.1f}   {min(values):.2f} to {max(values):.2f}"
        )
    print(f"{'ratio':14} {ratio:14.2f} {'':8}   {min(ratios):.2f} to {max(ratios):.2f}", flush=True)

    stages = {
        "ours": stage_times(degradation, degradation.degrade, photos),
        "torch": stage_times(theirs, theirs.degrade, photos),
    }
    print(f"\n{'ms per sample':14} {'ours':>7} {'torch':>7}   (measured stage by stage)")
    for stage in (*STAGES, "rest"):
        print(f"{stage:14} {stages['ours'][stage]:7.2f} {stages['torch'][stage]:7.2f}")
    full_ms, separable_ms = sharpening_times(theirs, photos)
    with_full = ratio + middle["ours"] * (full_ms - separable_ms) / 1000
    print(
        f"\ntorch's sharpening blurs along one axis after the other; with the 51×51 kernel it takes {full_ms:.0f} ms, not"
        f" {separable_ms:.0f},\nand the ratio would be {with_full:.2f}"
    )

    moved = statistics.mean(map(sharpened_psnr, photos))
    print(f"sharpening moves the photographs by {moved:.1f} dB (mean PSNR to the unsharpened ones)")
    needed = options.steps_per_second * options.batch
    cores = needed * (1 / middle["ours"] + read_s)
    reading = f", reading and cropping ({1000 * read_s:.1f} ms) included" if options.photos else ""
    print(
        f"to feed {options.steps_per_second:g} steps/s of {options.batch} samples: {cores:.2f} cores{reading};"
        f" the PyTorch version {needed * (1 / middle['torch'] + read_s):.2f}"
    )
    if options.json:
        figures = {
            "numpy": np.__version__, "opencv": cv2.__version__, "torch": torch.__version__, "size": options.size,
            "photos": str(options.photos) if options.photos else None, "apart_levels": levels, "apart_noise": noise,
            "samples_per_second": rates, "ratio": ratio, "ratio_with_full_kernel": with_full, "stage_ms": stages,
            "read_ms": 1000 * read_s, "cores": cores, "sharpened_psnr": moved,
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


# --- photographs ----------------------------------------------------------------------------------


def synthetic(options: Options) -> list[np.ndarray]:
    """Noise at all scales, strongest at the coarse ones; each (size, size, 3) float32 in [0, 1]."""
    side, photos = options.size, []
    for seed in range(options.samples):
        generator = np.random.default_rng(seed)
        image = np.zeros((side, side, 3), np.float32)
        for octave in range(max(1, side.bit_length() - 1)):
            coarse = generator.standard_normal((2**octave + 1, 2**octave + 1, 3), np.float32)
            image += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) / 2**octave
        photos.append(np.clip(0.5 + 0.2 * image, 0, 1))
    return photos


def crops(options: Options) -> tuple[list[np.ndarray], float]:
    """A random crop of each of the first photographs, and the mean seconds it takes to read and crop one."""
    paths = find_photographs(options.photos).files
    side, photos = options.size, []
    generator = np.random.default_rng(0)
    began = time.process_time()
    for index in range(options.samples):
        image = read_photo(paths[index % len(paths)], MAX_PIXELS).rgb
        image = reflect_pad(image, *(max(side, length) for length in image.shape[:2]))
        top, left = (int(generator.integers(length - side + 1)) for length in image.shape[:2])
        photos.append(image[top : top + side, left : left + side].astype(np.float32) / 255)
    return photos, (time.process_time() - began) / options.samples


# --- measuring ------------------------------------------------------------------------------------

Degrade = Callable[[np.ndarray, np.random.Generator], DegradedPair]


class Decisions(np.random.Generator):
    """Draws decisions from one stream and noise from another, so that drawing noise elsewhere keeps the decisions."""

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64([seed, 0]))
        self.noise = np.random.default_rng([seed, 1])

    def standard_normal(self, *arguments: Any, **named: Any) -> Any:
        return self.noise.standard_normal(*arguments, **named)

    def poisson(self, *arguments: Any, **named: Any) -> Any:
        return self.noise.poisson(*arguments, **named)


def compare(photos: Sequence[np.ndarray], config: DegradationConfig, count: int) -> tuple[float, float]:
    """Compares the two versions on `count` samples; returns the largest differences.

    Returns:
      Mean absolute difference of a pair without noise, in gray levels; relative difference of the noise's deviation, in all
      values and in the mean over channels, which tells gray noise from colored.

    Raises:
      UserError: the versions differ too much to compare their speed.
    """
    still = dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), noise=(0.0, 0.0), poisson=(0.0, 0.0))
            for name in ("first", "second")
        },
    )
    quiet, noisy = TorchDegradation(still), TorchDegradation(config)
    levels, noise = 0.0, 0.0
    for seed in range(count):
        photo = photos[seed % len(photos)]
        ours, theirs = (
            degradation.degrade(photo, Decisions(seed), still),
            quiet.degrade(photo, Decisions(seed)),
        )
        for a, b in zip(ours, theirs, strict=True):
            levels = max(levels, float(np.abs(a.astype(float) - b).mean()))
        for order in (config.first, config.second):
            added = [
                degradation.add_random_noise(photo, Decisions(seed), order) - photo,
                to_numpy(noisy.add_random_noise(to_tensor(photo), Decisions(seed), order)) - photo,
            ]
            for a, b in ([n.std() for n in added], [n.mean(-1).std() for n in added]):
                noise = max(noise, abs(float(a / b) - 1))
    if levels > TOLERANCE or noise > NOISE_TOLERANCE:
        raise UserError(
            f"the two versions differ, so their speeds cannot be compared: {levels:.4f} gray levels apart"
            f" (at most {TOLERANCE}), noise {noise:.1%} (at most {NOISE_TOLERANCE:.0%})"
        )
    return levels, noise


def measure(
    photos: Sequence[np.ndarray], versions: dict[str, Degrade], options: Options
) -> dict[str, list[float]]:
    """Samples per second of CPU time, per version and round. Each round has its own decisions."""
    rates = {name: [] for name in versions}
    for turn in range(options.rounds):
        # The order changes from round to round.
        for name in list(versions)[:: 1 if turn % 2 == 0 else -1]:
            began = time.process_time()
            for index, photo in enumerate(photos):
                versions[name](photo, Decisions(turn * len(photos) + index))
            rates[name].append(len(photos) / (time.process_time() - began))
    return rates


# Functions of `tsdsr_jax.data.degradation`, and methods of `TorchDegradation`.
STAGES = {
    "sharpen": ("sharpen",),
    "kernels": ("draw_kernel", "draw_final_kernel"),
    "blur": ("convolve",),
    "resize": ("resize_by", "resize_to"),
    "noise": ("add_random_noise",),
    "jpeg": ("jpeg",),
    "enlarge": ("bicubic",),
    "to bytes": ("to_bytes",),
}


def stage_times(owner: Any, degrade: Degrade, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean milliseconds per sample of each stage; times the owner's functions."""
    spent: Counter[str] = Counter()

    def clocked(stage: str, function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            began = time.process_time()
            result = function(*arguments)
            spent[stage] += time.process_time() - began
            return result

        return run

    with contextlib.ExitStack() as stack:
        for stage, names in STAGES.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, clocked(stage, getattr(owner, name))))
        began = time.process_time()
        for seed, photo in enumerate(photos):
            degrade(photo, Decisions(seed))
        spent["rest"] = time.process_time() - began - spent.total()
    return {stage: 1000 * spent[stage] / len(photos) for stage in (*STAGES, "rest")}


def sharpening_times(theirs: TorchDegradation, photos: Sequence[np.ndarray]) -> tuple[float, float]:
    """Median milliseconds of the PyTorch version's sharpening, with the 51×51 kernel and separably."""
    times = {False: [], True: []}
    for photo in photos[:4]:
        for separable, spent in times.items():
            began = time.process_time()
            theirs.sharpen(to_tensor(photo), separable=separable)
            spent.append(1000 * (time.process_time() - began))
    return statistics.median(times[False]), statistics.median(times[True])


def sharpened_psnr(photo: np.ndarray) -> float:
    """PSNR of a sharpened target to its photograph, in dB."""
    return -10 * math.log10(float(np.square(degradation.sharpen(photo) - photo).mean()))


# --- the same in PyTorch --------------------------------------------------------------------------


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W)."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()


def to_numpy(image: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) -> (H, W, 3)."""
    return image[0].permute(1, 2, 0).contiguous().numpy()


def correlate(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Filters each channel with the same kernel; borders are mirrored."""
    rows, columns = kernel.shape
    image = F.pad(image, (columns // 2, columns // 2, rows // 2, rows // 2), mode="reflect")
    return F.conv2d(image, kernel.expand(3, 1, rows, columns), groups=3)


class TorchDegradation:
    """`degrade` written in PyTorch. Images are (1, 3, H, W); decisions are drawn as in ours, noise by torch."""

    def __init__(self, config: DegradationConfig):
        self.config = config
        # OpenCV's deviation for 51 pixels.
        axis = torch.arange(-25.0, 26.0)
        window = torch.exp(-(axis**2) / (2 * 8.0**2))
        self.window = window / window.sum()
        k = torch.arange(8.0)
        cosines = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
        cosines[0] /= math.sqrt(2)
        self.cosines = cosines
        self.tables = torch.from_numpy(LUMA.copy()), torch.from_numpy(CHROMA.copy())
        self.to_ycc = torch.tensor(
            [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
        )
        self.to_rgb = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])

    def degrade(self, photo: np.ndarray, generator: np.random.Generator) -> DegradedPair:
        with torch.inference_mode():
            hr = to_tensor(photo)
            if self.config.sharpen:
                hr = self.sharpen(hr)
            small = self.low_resolution(hr, generator)
            return DegradedPair(self.to_bytes(self.bicubic(small, *hr.shape[2:])), self.to_bytes(hr))

    def low_resolution(self, hr: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        height, width = (side // self.config.scale for side in hr.shape[2:])
        first, second = self.config.first, self.config.second

        image = self.convolve(hr, self.draw_kernel(generator, first.sigma))
        factor = degradation.draw_factor(generator, first)
        image = self.resize_by(image, factor, degradation.draw_mode(generator))
        image = self.jpeg(self.add_random_noise(image, generator, first), generator.uniform(*first.quality))

        if generator.random() < second.blur:
            image = self.convolve(image, self.draw_kernel(generator, second.sigma))
        factor = degradation.draw_factor(generator, second)
        size = max(1, int(height * factor)), max(1, int(width * factor))
        image = self.resize_to(image, *size, degradation.draw_mode(generator))
        image = self.add_random_noise(image, generator, second)

        quality = generator.uniform(*second.quality)
        if generator.random() < 0.5:
            image = self.resize_to(image, height, width, degradation.draw_mode(generator))
            image = self.convolve(image, self.draw_final_kernel(generator))
            image = self.jpeg(image.clamp(0, 1), quality)
        else:
            image = self.jpeg(image, quality)
            image = self.resize_to(image, height, width, degradation.draw_mode(generator))
            image = self.convolve(image, self.draw_final_kernel(generator))
        return image.clamp(0, 1)

    def to_bytes(self, image: torch.Tensor) -> np.ndarray:
        return to_numpy((255 * image).round().clamp(0, 255).to(torch.uint8))

    def draw_kernel(self, generator: np.random.Generator, sigma: Range) -> torch.Tensor:
        return torch.from_numpy(degradation.draw_kernel(generator, sigma, self.config))

    def draw_final_kernel(self, generator: np.random.Generator) -> torch.Tensor:
        return torch.from_numpy(degradation.draw_final_kernel(generator, self.config))

    def convolve(self, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return correlate(image, kernel)

    def sharpen(self, image: torch.Tensor, separable: bool = True) -> torch.Tensor:
        def blur(x: torch.Tensor) -> torch.Tensor:
            if separable:
                return correlate(correlate(x, self.window[None]), self.window[:, None])
            return correlate(x, torch.outer(self.window, self.window))

        detail = image - blur(image)
        soft = blur((255 * detail.abs() > 10).float())
        return soft * (image + 0.5 * detail).clamp(0, 1) + (1 - soft) * image

    def resize_by(self, image: torch.Tensor, factor: float, mode: Mode) -> torch.Tensor:
        return F.interpolate(image, scale_factor=factor, mode=mode)

    def resize_to(self, image: torch.Tensor, height: int, width: int, mode: Mode) -> torch.Tensor:
        return F.interpolate(image, size=(height, width), mode=mode)

    def bicubic(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return F.interpolate(image, size=(height, width), mode="bicubic")

    def add_random_noise(
        self, image: torch.Tensor, generator: np.random.Generator, order: Order
    ) -> torch.Tensor:
        if generator.random() < order.gaussian:
            sigma, grey = generator.uniform(*order.noise), generator.random() < order.grey
            noise = sigma / 255 * torch.randn_like(image[:, :1] if grey else image)
        else:
            scale, grey = generator.uniform(*order.poisson), generator.random() < order.grey
            clean = image
            if grey:
                clean = 0.2989 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
            clean = (255 * clean).round().clamp(0, 255) / 255
            photons = 2 ** math.ceil(math.log2(len(torch.unique(clean))))
            noise = scale * (torch.poisson(clean * photons) / photons - clean)
        return (image + noise).clamp(0, 1)

    def jpeg(self, image: torch.Tensor, quality: float) -> torch.Tensor:
        height, width = image.shape[2:]
        factor = 50 / quality if quality < 50 else 2 - quality / 50
        image = F.pad(255 * image, (0, -width % 16, 0, -height % 16))
        ycc = torch.einsum("dc,bchw->bdhw", self.to_ycc, image)
        luma = self.quantised(ycc[:, :1] - 128, self.tables[0] * factor) + 128
        chroma = self.quantised(F.avg_pool2d(ycc[:, 1:], 2), self.tables[1] * factor)
        chroma = F.interpolate(chroma, scale_factor=2, mode="nearest")
        image = torch.einsum("dc,bchw->bdhw", self.to_rgb, torch.cat([luma, chroma], 1))
        return (image[..., :height, :width] / 255).clamp(0, 1)

    def quantised(self, planes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) with the DCT of its 8×8 blocks quantized."""
        batch, channels, height, width = planes.shape
        blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
        coefficients = torch.einsum("ui,bcrsij,vj->bcrsuv", self.cosines, blocks, self.cosines)
        coefficients = (coefficients / table).round() * table
        blocks = torch.einsum("ui,bcrsuv,vj->bcrsij", self.cosines, coefficients, self.cosines)
        return blocks.transpose(3, 4).reshape(planes.shape)


if __name__ == "__main__":
    cli.run(main)
