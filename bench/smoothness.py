"""Measures how smooth autoencoders are: what small errors in their latents do to pictures.

python bench/smoothness.py --vae weights/tiny/vae --vae runs/tiny/autoencoder/.../vae --photos bsds500/val

A student's latents always have small errors. In a smooth latent space they make small, unobtrusive errors in the picture;
otherwise they become grids and combs. All figures but the first are gray levels (RMS over the pictures).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import structure

from tsdsr_jax import cli
from tsdsr_jax.evaluation.tables import layout_columns
from tsdsr_jax.images.files import IMAGE_SUFFIXES, read_photo
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.weights.sd3_folder import NetworkFiles

MAX_PIXELS = 20_000_000
# Side of the crops, and of the part of each that is decoded alone.
SIDE, PART = 256, 128
# Deviation of the noise and size of the shift, in the latents' deviations.
NOISE, SHIFT = 0.1, 0.2
COLUMNS = ("psnr", "noise", "shift", "seam", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    vae: tuple[Path, ...]
    """Folder of an autoencoder; repeat for several."""
    photos: Path
    """Folder of photographs with sides of at least 256."""
    count: int = 16
    """Number of photographs."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    photos = crops(options.photos, options.count)
    rows = []
    for folder in options.vae:
        found = measured(folder, photos)
        rows.append((str(folder), *(f"{found[name]:.2f}" for name in COLUMNS)))
    print(layout_columns([("", *COLUMNS), *rows]))
    print(f"""
psnr: of rebuilt pictures (dB). noise: change by noise of {NOISE} in the latents.
shift: pattern that a shift of all latents by {SHIFT} paints, without its mean.
seam: difference of {PART}² decoded alone and as a part of {SIDE}².
grid: energy of eight-pixel patterns in flat areas, over the originals'.""")


def crops(folder: Path, count: int) -> np.ndarray:
    """The centers of the first photographs, (N, 256, 256, 3) uint8."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    found = []
    for path in paths:
        photo = read_photo(path, MAX_PIXELS).rgb
        top, left = ((side - SIDE) // 2 for side in photo.shape[:2])
        if min(top, left) >= 0 and len(found) < count:
            found.append(photo[top : top + SIDE, left : left + SIDE])
    return np.stack(found)


def measured(folder: Path, photos: np.ndarray) -> dict[str, float]:
    """The figures of one autoencoder."""
    files = NetworkFiles(folder, "vae")
    network: Any = AutoencoderKL(files.config)  # type: ignore[arg-type]
    params = files.load(jnp.float32)

    @jax.jit
    def encode(params: Any, image: jax.Array) -> jax.Array:
        return network.apply({"params": params}, image[None] / 127.5 - 1, method="encode").mean

    @jax.jit
    def decode(params: Any, latent: jax.Array) -> jax.Array:
        return jnp.clip(network.apply({"params": params}, latent, method="decode")[0] * 127.5 + 127.5, 0, 255)

    def picture(latent: Any) -> np.ndarray:
        return np.asarray(decode(params, latent))

    images = photos.astype(np.float32)
    latents = [np.asarray(encode(params, image)) for image in images]
    deviation = float(np.std(latents))
    generator = np.random.default_rng(0)
    plain = [picture(latent) for latent in latents]

    def change(of: Callable[[np.ndarray], np.ndarray], centered: bool) -> float:
        """RMS change of the pictures when their latents change, optionally without each picture's mean change."""
        changes = [
            picture(latent + of(latent)) - before for latent, before in zip(latents, plain, strict=True)
        ]
        if centered:
            changes = [each - each.mean((0, 1)) for each in changes]
        return float(np.sqrt(np.mean(np.square(changes))))

    part = PART // network.config.factor
    alone = [
        picture(latent[:, :part, :part]) - before[:PART, :PART]
        for latent, before in zip(latents, plain, strict=True)
    ]
    grids = [
        structure.grid_energy(structure.luminance(before), structure.luminance(image))
        for before, image in zip(plain, images, strict=True)
    ]
    of_results, of_originals = map(sum, zip(*grids, strict=True))
    errors = [np.mean(np.square(before - image)) for before, image in zip(plain, images, strict=True)]
    return {
        "psnr": statistics.fmean(float(10 * np.log10(255**2 / error)) for error in errors),
        "noise": change(
            lambda latent: NOISE * deviation * generator.standard_normal(latent.shape, np.float32), False
        ),
        "shift": change(lambda latent: np.full_like(latent, SHIFT * deviation), True),
        "seam": float(np.sqrt(np.mean(np.square(alone)))),
        "grid": of_results / of_originals,
    }


if __name__ == "__main__":
    cli.run(main)
