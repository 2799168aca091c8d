"""Times PSNR, SSIM and NIQE on a folder of pairs: ours against the same in PyTorch and in NumPy, in one run.

    python bench/metrics.py --inp_imgs bicubic --gt_imgs drealsr/test_HR --niqe_params niqe_pris_params.npz

PyTorch works like pyiqa: one picture at a time, in float64, with two-dimensional convolutions. NumPy is the tests' oracle.
All three read the files themselves; ours reads in threads while it computes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import oracle_metrics
from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.measure import FilePair, find_pairs, measure
from tsdsr_jax.evaluation.niqe_params import PristineModel, load_pristine
from tsdsr_jax.evaluation.registry import Sources, load_metrics
from tsdsr_jax.images.files import read_photo

NAMES = "psnr", "ssim", "niqe"
MAX_PIXELS = 100_000_000
# Values that differ more from ours are not the same metric. PyTorch's NIQE differs by 0.2 on single pictures, like pyiqa's,
# because it does not handle pixels that equal their surroundings' mean.
FARTHEST = {"psnr": 1e-3, "ssim": 1e-4, "niqe": 0.02}


@dataclasses.dataclass(frozen=True)
class Options:
    inp_imgs: Path
    """Folder of results."""
    gt_imgs: Path
    """Folder of references."""
    niqe_params: Path
    """NIQE's parameters."""
    rounds: int = 3
    """Number of runs of ours and of PyTorch; medians are shown."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: expected at least 1")
    pairs, problems = find_pairs(options.inp_imgs, options.gt_imgs)
    if problems:
        raise UserError(problems[0])
    model = load_pristine(options.niqe_params)
    torch_metrics = TorchMetrics(model)
    metrics, _ = load_metrics(NAMES, Sources(True, options.niqe_params))

    def ours() -> np.ndarray:
        measured = measure(pairs, metrics, jax.devices()[0], MAX_PIXELS)
        return np.array([measured.of(name) for name in NAMES]).T

    def one_by_one(function: Callable) -> Callable[[], np.ndarray]:
        return lambda: np.array([function(*pixels(pair)) for pair in pairs])

    def in_numpy(result: np.ndarray, reference: np.ndarray) -> list[float]:
        niqe = oracle_metrics.niqe(result, model.mean, model.covariance)
        return [oracle_metrics.psnr(result, reference), oracle_metrics.ssim(result, reference), niqe]

    values, cold = timed(ours)
    in_torch = one_by_one(torch_metrics)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(options.rounds):
        for name, function in (("ours", ours), ("torch", in_torch)):
            found, seconds = timed(function)
            times[name].append(seconds)
            if name == "torch":
                theirs = found
    numpy_values, numpy_seconds = timed(one_by_one(in_numpy))

    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    figures = {
        "pairs": len(pairs), "device": jax.devices()[0].device_kind, "jax": jax.__version__, "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(), "seconds": times, "first_run_seconds": cold,
        "numpy_seconds": numpy_seconds, "ratio_torch": middle["torch"] / middle["ours"],
        "ratio_torch_first_run": middle["torch"] / cold, "ratio_numpy": numpy_seconds / middle["ours"],
    }  # fmt: skip
    print(f"{len(pairs)} pairs, {figures['device']}, {figures['torch_threads']} threads for PyTorch")
    print(
        f"ratio to PyTorch {figures['ratio_torch']:.1f}, with compilation {figures['ratio_torch_first_run']:.1f}"
    )
    print(f"ratio to NumPy {figures['ratio_numpy']:.1f}")
    for other, found in (("NumPy", numpy_values), ("PyTorch", theirs)):
        apart = np.abs(values - found)
        figures[f"apart_{other.lower()}"] = dict(zip(NAMES, apart.max(0).tolist(), strict=True))
        means = np.abs(values.mean(0) - found.mean(0))
        for name, most, mean in zip(NAMES, apart.max(0), means, strict=True):
            print(f"{name} from {other}'s: at most {most:.1e}, means {mean:.1e}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    too_far = [name for name in NAMES if figures["apart_numpy"][name] > FARTHEST[name]]
    if too_far:
        raise UserError(
            f"{', '.join(too_far)}: too far from NumPy's values, so that speeds cannot be compared"
        )


def pixels(pair: FilePair) -> tuple[np.ndarray, np.ndarray]:
    return read_photo(pair.result, MAX_PIXELS).rgb, read_photo(pair.reference, MAX_PIXELS).rgb


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


class TorchMetrics:
    """The three metrics in float64, one picture at a time."""

    def __init__(self, model: PristineModel):
        self.mean, self.covariance = map(torch.from_numpy, (model.mean, model.covariance))
        self.window = {size: self.gaussian(size, sigma) for size, sigma in ((11, 1.5), (7, 7 / 6))}
        self.shapes = torch.arange(200, 10001, dtype=torch.float64) / 1000
        log_gamma = torch.lgamma
        self.ratios = torch.exp(
            2 * log_gamma(2 / self.shapes) - log_gamma(1 / self.shapes) - log_gamma(3 / self.shapes)
        )
        distance = torch.abs(torch.arange(8) - 3.5).double() / 2
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        taps = torch.where(distance <= 1, near, far)
        self.halving = torch.outer(taps, taps)[None, None] / taps.sum() ** 2

    @staticmethod
    def gaussian(size: int, sigma: float) -> torch.Tensor:
        taps = torch.exp(-((torch.arange(size).double() - size // 2) ** 2) / (2 * sigma**2))
        window = torch.outer(taps, taps)
        return (window / window.sum())[None, None]

    def __call__(self, result: np.ndarray, reference: np.ndarray) -> list[float]:
        first, second = (torch.from_numpy(image).double() / 255 for image in (result, reference))
        luma = [16 + image @ torch.tensor([65.481, 128.553, 24.966]).double() for image in (first, second)]
        error = torch.mean(((luma[0] - luma[1]) / 255) ** 2)
        psnr = float(10 * torch.log10(1 / (error + 1e-8)))
        full = (first @ torch.tensor([0.299, 0.587, 0.114]).double() * 255).round()
        return [psnr, self.ssim(*luma), self.niqe(full)]

    def ssim(self, first: torch.Tensor, second: torch.Tensor) -> float:
        x, y = first.round()[None, None], second.round()[None, None]
        moments = torch.cat([x, y, x * x, y * y, x * y])
        mx, my, xx, yy, xy = functional.conv2d(moments, self.window[11])[:, 0]
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        structure = (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2)
        brightness = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        return float((structure.clamp(min=0) * brightness).mean())

    def niqe(self, image: torch.Tensor) -> float:
        rows, columns = image.shape[0] // 96, image.shape[1] // 96
        image = image[None, None, : rows * 96, : columns * 96]
        scales = []
        for side in (96, 48):
            padded = functional.pad(image, (3, 3, 3, 3), mode="replicate")
            mean, square = (functional.conv2d(part, self.window[7]) for part in (padded, padded**2))
            normalised = (image - mean) / ((square - mean**2).abs().sqrt() + 1)
            blocks = normalised.reshape(rows, side, columns, side).transpose(1, 2).reshape(-1, side, side)
            scales.append(self.features(blocks))
            edged = torch.cat([image[..., :3].flip(-1), image, image[..., -3:].flip(-1)], dim=-1)
            edged = torch.cat([edged[..., :3, :].flip(-2), edged, edged[..., -3:, :].flip(-2)], dim=-2)
            image = functional.conv2d(edged, self.halving, stride=2)
        features = torch.cat(scales, dim=1)
        whole = features[~features.isnan().any(1)]
        spread = (torch.cov(whole.T) + self.covariance) / 2
        offset = self.mean - features.nanmean(0)
        return float((offset @ torch.linalg.pinv(spread) @ offset).sqrt())

    def features(self, blocks: torch.Tensor) -> torch.Tensor:
        shape, left, right = self.fit(blocks)
        features = [shape, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
            shape, left, right = self.fit(blocks * blocks.roll(shift, (1, 2)))
            mean = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
            features += [shape, mean, left, right]
        return torch.stack(features, dim=1)

    def fit(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        below, above = values < 0, values > 0
        squares = values**2
        left = ((squares * below).sum((1, 2)) / below.sum((1, 2))).sqrt()
        right = ((squares * above).sum((1, 2)) / above.sum((1, 2))).sqrt()
        gamma = left / right
        ratio = values.abs().mean((1, 2)) ** 2 / squares.mean((1, 2))
        ratio = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
        shape = self.shapes[(self.ratios - ratio[:, None]).abs().argmin(1)]
        scale = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)
        return shape, left * scale, right * scale


if __name__ == "__main__":
    cli.run(main)
