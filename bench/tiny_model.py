"""Measures the models that train/recipes/tiny.sh makes, together with the baselines they should beat.

python bench/tiny_model.py --runs runs/tiny --hr_dir drealsr/test_HR --lr_dir drealsr/test_LR
    --niqe_params niqe_pris_params.npz --output_dir runs/tiny/table

The table has bicubic; the autoencoder alone on the HR pictures, the upper bound for any student; bicubic with blurred noise
at the last student's PSNR, which NIQE mistakes for detail; bicubic with an unsharp mask in three strengths, which it likes,
too; and every student, RUNS/model-NAME-SEED, with its seeds together. `--others` adds folders of results from elsewhere.

Beside `infer/evaluate.py`'s metrics it has those of structure.py: VIF (more is better), GMSD (less is better), and the
energy of patterns of eight pixels in flat areas, divided by the originals'.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import structure
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.data.degradation import DegradationConfig, light, low_resolution, to_bytes
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.measure import FilePair, by_name, find_pairs, measure
from tsdsr_jax.evaluation.psnr_ssim import psnr_y
from tsdsr_jax.evaluation.registry import Metric, Sources, load_metrics
from tsdsr_jax.evaluation.tables import layout_columns
from tsdsr_jax.images.files import read_photo, read_size
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.weights.sd3_folder import open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
EVALUATED = ("psnr", "ssim", "niqe", "detail")
METRICS = (*EVALUATED, "vif", "gmsd", "grid")
MAX_PIXELS = 100_000_000
FACTOR = 16
# Pixels; of the control's noise.
BLUR = 1.0
# Pixels, and strengths; of the unsharp masks.
UNSHARP, STRENGTHS = 1.5, (0.7, 1.2, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    runs: Path
    """The recipe's --output, or a folder of several models called model-NAME-SEED."""
    hr_dir: Path
    """Folder of photographs that were not used in training."""
    lr_dir: Path | None = None
    """Folder of their low-resolution versions. Default: cut the photographs to multiples of 16 and degrade them lightly."""
    niqe_params: Path
    """NIQE's parameters."""
    others: tuple[Path, ...] = ()
    """Folder of other results for the same pictures; repeat for several. Its row has the folder's name."""
    output_dir: Path
    """Folder for all pictures and for table.json."""


@dataclasses.dataclass
class Row:
    """One method's row of the table.

    Attributes:
      name: its name in the table.
      values: metric -> its mean over the pictures, one per seed.
    """

    name: str
    values: dict[str, list[float]]

    def cells(self) -> list[str]:
        return [self.name, *(_cell(self.values[metric]) for metric in METRICS)]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    models = find_models(options.runs)
    lr, hr = pairs_of(options)
    metrics, missing = load_metrics(EVALUATED, Sources(True, options.niqe_params))
    if missing:
        raise UserError("; ".join(missing.values()))

    def row(name: str, *folders: Path) -> Row:
        found = [of_folder(folder, hr, metrics) for folder in folders]
        return Row(name, {metric: [values[metric] for values in found] for metric in METRICS})

    output = options.output_dir
    rows = [row("bicubic", each(lr, output / "bicubic", enlarged))]
    first = next(iter(models.values()))[0]
    rows.append(row("autoencoder alone (ceiling)", each(hr, output / "autoencoder", rebuilt(first))))
    students = [
        row(f"student, {name}", *(upscaled(model, lr, output / model.name) for model in found))
        for name, found in models.items()
    ]
    wanted = statistics.fmean(students[-1].values["psnr"])
    rows.append(row("bicubic + blurred noise (control)", control(lr, hr, output / "control", wanted)))
    for strength in STRENGTHS:
        folder = each(lr, output / f"unsharp-{strength:g}", partial(sharpened, strength=strength))
        rows.append(row(f"bicubic + unsharp mask {strength:g} (control)", folder))
    rows += [row(folder.name, folder) for folder in options.others]
    rows += students
    print(layout_columns([("", *METRICS), *(row.cells() for row in rows)]))
    (output / "table.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def find_models(runs: Path) -> dict[str, list[Path]]:
    """Student's name -> its models, one per seed."""
    models: dict[str, list[Path]] = {}
    for folder in sorted(runs.glob("model-*-*")):
        if found := re.fullmatch(r"model-(.+)-(\d+)", folder.name):
            models.setdefault(found[1], []).append(folder)
    if not models:
        raise UserError(f"{runs}: no folder called model-NAME-SEED, as train/recipes/tiny.sh makes them")
    order = {name: place for place, name in enumerate(("mse", "pixel", "tsd", "dasm", "adv", "full"))}
    return dict(sorted(models.items(), key=lambda item: order.get(item[0], len(order))))


def pairs_of(options: Options) -> tuple[Path, Path]:
    """Folders of low- and high-resolution pictures with the same names."""
    if options.lr_dir:
        pairs, problems = find_pairs(options.lr_dir, options.hr_dir)
        for pair in pairs:
            small, large = (read_size(path, MAX_PIXELS) for path in (pair.result, pair.reference))
            if large != (4 * small[0], 4 * small[1]) or large[0] % 8 or large[1] % 8:
                problems.append(f"{pair.reference}: expected four times {pair.result}, sides multiples of 8")
        if problems:
            raise UserError(problems[0])
        return options.lr_dir, options.hr_dir
    lr, hr = options.output_dir / "lr", options.output_dir / "hr"
    for folder in (lr, hr):
        if folder.exists():
            raise UserError(f"{folder}: already exists; choose another --output_dir, or remove it")
    config = light(DegradationConfig(sharpen=False))
    for index, (name, path) in enumerate(
        tqdm(by_name(options.hr_dir)[0].items(), desc="degraded", disable=None)
    ):
        photo = read_photo(path, MAX_PIXELS).rgb
        height, width = (side // FACTOR * FACTOR for side in photo.shape[:2])
        photo = photo[:height, :width]
        small = low_resolution(photo.astype(np.float32) / 255, np.random.default_rng(index), config)
        save(to_bytes(small), lr / f"{name}.png")
        save(photo, hr / f"{name}.png")
    return lr, hr


def of_folder(results: Path, hr: Path, metrics: Sequence[Metric]) -> dict[str, float]:
    pairs, problems = find_pairs(results, hr)
    measured = measure(pairs, metrics, jax.devices()[0], MAX_PIXELS)
    if problems + measured.problems:
        raise UserError((problems + measured.problems)[0])
    found = {metric: statistics.fmean(measured.of(metric)) for metric in EVALUATED}
    return found | of_structure(pairs)


def of_structure(pairs: Sequence[FilePair]) -> dict[str, float]:
    """The metrics of structure.py, means over all pictures; the grid's energies are summed before they are divided."""
    vifs, gmsds, grids = [], [], []
    for pair in pairs:
        result, original = (
            structure.luminance(read_photo(path, MAX_PIXELS).rgb) for path in (pair.result, pair.reference)
        )
        vifs.append(structure.vif(result, original))
        gmsds.append(structure.gmsd(result, original))
        grids.append(structure.grid_energy(result, original))
    of_results, of_originals = map(sum, zip(*grids, strict=True))
    return {"vif": statistics.fmean(vifs), "gmsd": statistics.fmean(gmsds), "grid": of_results / of_originals}


def each(source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Applies a function, (H, W, 3) uint8 -> the same, to every picture."""
    for name, path in tqdm(by_name(source)[0].items(), desc=target.name, disable=None):
        result = change(read_photo(path, MAX_PIXELS).rgb)
        save(result, target / f"{name}.png")
    return target


def save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # names may have folders in them
    Image.fromarray(picture).save(path)


def enlarged(picture: np.ndarray) -> np.ndarray:
    size = 4 * picture.shape[1], 4 * picture.shape[0]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def sharpened(picture: np.ndarray, strength: float) -> np.ndarray:
    """Enlarges and sharpens: adds the difference from a blurred copy, times `strength`."""
    large = enlarged(picture).astype(np.float32)
    blurred = ndimage.gaussian_filter(large, (UNSHARP, UNSHARP, 0))
    return np.clip(np.round(large + strength * (large - blurred)), 0, 255).astype(np.uint8)


def rebuilt(model: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Encodes and decodes, without LoRAs."""
    files = open_checkpoint(model).network("vae")
    network, params = AutoencoderKL(files.config), files.load(jnp.float32)
    run = jax.jit(lambda params, images: network.apply({"params": params}, images))

    def change(picture: np.ndarray) -> np.ndarray:
        images = picture[None].astype(np.float32) / 127.5 - 1
        return np.asarray(jnp.clip(jnp.round((run(params, images)[0] + 1) * 127.5), 0, 255), np.uint8)

    return change


def upscaled(model: Path, lr: Path, output: Path) -> Path:
    command = [
        sys.executable, "infer/upscale.py", "--pretrained_model_name_or_path", model.resolve(),
        "--lora_dir", (model / "lora").resolve(), "--embedding_dir", (model / "prompt" / "default").resolve(),
        "--process_size", "16", "--overwrite", "-i", lr.resolve(), "-o", output.resolve(),
    ]  # fmt: skip
    if subprocess.run([str(word) for word in command], cwd=ROOT).returncode:
        raise UserError(f"{model}: infer/upscale.py failed")
    return output


def control(lr: Path, hr: Path, output: Path, wanted: float) -> Path:
    """Bicubic plus blurred Gaussian noise, strong enough that the mean PSNR is `wanted`."""
    pairs, _ = find_pairs(lr, hr)
    bicubic, noise, truth = [], [], []
    for index, pair in enumerate(pairs):
        bicubic.append(enlarged(read_photo(pair.result, MAX_PIXELS).rgb))
        truth.append(read_photo(pair.reference, MAX_PIXELS).rgb)
        noise.append(blurred_noise(bicubic[-1].shape[:2], index))

    def noisy(strength: float) -> list[np.ndarray]:
        sums = (base + strength * grain for base, grain in zip(bicubic, noise, strict=True))
        return [np.clip(np.round(each), 0, 255).astype(np.uint8) for each in sums]

    def reached(strength: float) -> float:
        return statistics.fmean(
            float(measured(made[None], true[None], np.array([made.shape[:2]]))[0])
            for made, true in zip(noisy(strength), truth, strict=True)
        )

    measured, low, high = jax.jit(psnr_y), 0.0, 64.0
    if reached(0) <= wanted:
        print("the student's PSNR is not below bicubic's: the control is bicubic itself")
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > wanted else (low, middle)
    for pair, picture in zip(pairs, noisy(low), strict=True):
        save(picture, output / f"{pair.name}.png")
    return output


def blurred_noise(size: tuple[int, int], seed: int) -> np.ndarray:
    """Blurred noise (H, W, 1) of deviation 1."""
    grain = np.random.default_rng(seed).standard_normal(size)
    grain = ndimage.gaussian_filter(grain, BLUR, mode="constant")
    return (grain / grain.std())[..., None]


if __name__ == "__main__":
    cli.run(main)
