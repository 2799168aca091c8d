"""The metrics that an evaluation computes: our own in JAX, all others with pyiqa.

If a metric cannot be computed because a file of weights or a package is missing, the reason is returned for the tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.evaluation import niqe, psnr_ssim, pyiqa_metrics
from tsdsr_jax.evaluation.niqe_params import load_pristine
from tsdsr_jax.hints import command
from tsdsr_jax.models.lpips import LPIPS, minimum_side
from tsdsr_jax.models.params import Tree
from tsdsr_jax.weights.lpips_files import load_lpips

OWN_FILES = {
    "niqe": "--niqe_params (BasicSR's niqe_pris_params.npz, also in TSD-SR's repository, or pyiqa's .mat), or ",
    "lpips": "--lpips_weights (convert/lpips.py makes them), or ",
}
Better = Literal["higher", "lower"]

PAPER = ("psnr", "ssim", "lpips", "dists", "fid", "niqe", "musiq", "maniqa-pipal", "clipiqa")
"""The metrics of TSD-SR's tables, by pyiqa's names."""


@dataclasses.dataclass(frozen=True, eq=False)
class PictureBatch:
    """Pictures in the top left corners of an array.

    Attributes:
      results, references: (B, H, W, 3) uint8; references is None if there are none.
      sizes: (B, 2) int32, height and width of each picture; (H, W) for unused places.
      count: number of pictures; they come first.
      device: where JAX computes.
    """

    results: np.ndarray
    references: np.ndarray | None
    sizes: np.ndarray
    count: int
    device: jax.Device

    @cached_property
    def on_device(self) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        return jax.device_put((self.results, self.references, self.sizes), self.device)

    def picture(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """One result and its reference, in their original size."""
        height, width = self.sizes[index]
        reference = None if self.references is None else self.references[index, :height, :width]
        return self.results[index, :height, :width], reference


Values = Callable[[], Sequence[float | str]]
"""Waits for a batch's values; returns a number for each picture, or the reason why there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A metric of pictures, or of whole folders.

    Attributes:
      name: pyiqa's name.
      better: which values are better; None if unknown.
      needs_reference: whether it compares with a reference.
      source: what computes it, for the log.
      start: for metrics of pictures: starts a batch and returns at once.
      over_folders: for metrics of whole folders: (results, references) -> value.
      smallest: the smallest height and width that a picture may have, in either order.
    """

    name: str
    better: Better | None
    needs_reference: bool
    source: str
    start: Callable[[PictureBatch], Values] | None = None
    over_folders: Callable[[Sequence[Path], Sequence[Path]], float] | None = None
    smallest: tuple[int, int] = (1, 1)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name.upper()

    def fits(self, height: int, width: int) -> bool:
        return min(height, width) >= min(self.smallest) and max(height, width) >= max(self.smallest)


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is available to metrics.

    Attributes:
      references: whether there are references.
      niqe_params, lpips_weights: files; if None, pyiqa computes these metrics, where it is installed.
    """

    references: bool
    niqe_params: Path | None = None
    lpips_weights: Path | None = None


def load_metrics(names: Sequence[str], sources: Sources) -> tuple[list[Metric], dict[str, str]]:
    """Loads metrics by name; returns them, and name -> reason for those that cannot be computed.

    Raises:
      UserError: a file of weights or parameters is missing, damaged or of another kind.
    """
    loaded, missing = [], {}
    for name in dict.fromkeys(names):
        found = _load(name, sources)
        if isinstance(found, str):
            missing[name] = found
        elif found.needs_reference and not sources.references:
            missing[name] = "compares with a reference: needs --gt_imgs"
        else:
            loaded.append(found)
    return loaded, missing


def _load(name: str, sources: Sources) -> Metric | str:
    """Loads a metric, or returns the reason why it cannot be computed."""
    if name == "psnr":
        return Metric(name, "higher", True, "tsdsr_jax", _starting(psnr_ssim.psnr_y))
    if name == "ssim":
        smallest = (psnr_ssim.SSIM_SIDE,) * 2
        return Metric(name, "higher", True, "tsdsr_jax", _starting(psnr_ssim.ssim_y), smallest=smallest)
    if name == "detail":
        return Metric(
            name, "higher", True, "tsdsr_jax", _starting(psnr_ssim.detail_correlation), smallest=(4, 4)
        )
    if name == "niqe" and sources.niqe_params:
        return _niqe(sources.niqe_params)
    if name == "lpips" and sources.lpips_weights:
        return _lpips(sources.lpips_weights)
    if not pyiqa_metrics.is_installed():
        similar = [] if name in PAPER else difflib.get_close_matches(name, PAPER, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        return f"needs {OWN_FILES.get(name, '')}pyiqa: pip install 'tsdsr_jax[metrics]'{hint}"
    found = pyiqa_metrics.load_pyiqa_metric(name)
    if isinstance(found, str):
        return found
    needs_reference = found.needs_reference
    better: Better = "lower" if found.lower_better else "higher"
    if found.over_folders:
        return Metric(name, better, needs_reference, found.source, over_folders=found.of_folders)

    def value(batch: PictureBatch, index: int) -> float | str:
        try:
            return found.of_pair(*batch.picture(index))
        except Exception as error:  # pyiqa's own errors, for example about too small a picture
            return first_line(error)

    def start(batch: PictureBatch) -> Values:
        return lambda: [value(batch, index) for index in range(batch.count)]

    return Metric(name, better, needs_reference, found.source, start)


def _starting(function: Callable[..., jax.Array]) -> Callable[[PictureBatch], Values]:
    def start(batch: PictureBatch) -> Values:
        values = function(*batch.on_device)
        return lambda: np.asarray(values, float).tolist()

    return start


def _niqe(path: Path) -> Metric:
    model = load_pristine(path)

    def start(batch: PictureBatch) -> Values:
        results, _, sizes = batch.on_device
        moments = niqe.block_moments(results, sizes)
        return lambda: [
            "fewer than two of its blocks have any texture" if math.isnan(value) else value
            for value in niqe.distances(moments, batch.sizes, model)
        ]

    smallest = niqe.BLOCK, 2 * niqe.BLOCK
    return Metric("niqe", "lower", False, f"tsdsr_jax, {path.name}", start, smallest=smallest)


def _lpips(path: Path) -> Metric:
    if not os.path.isfile(path):
        raise UserError(
            f"--lpips_weights {path}: not found; {command('convert/lpips.py', help=True)} says how to make them"
        )
    network, params = load_lpips(path)
    # One program per size, because padding to a common size would change what its convolutions see at the borders.
    compare = jax.jit(LPIPS(network).apply)

    @cache
    def placed(device: jax.Device) -> dict[str, Tree]:
        return {"params": jax.device_put(params, device)}

    def start(batch: PictureBatch) -> Values:
        variables = placed(batch.device)
        values = []
        with jax.default_matmul_precision("highest"):
            for index in range(batch.count):
                pair = jax.device_put(batch.picture(index), batch.device)
                values.append(compare(variables, *(image[None] / 127.5 - 1 for image in pair))[0])
        return lambda: [float(value) for value in values]

    smallest = (minimum_side(network),) * 2
    return Metric("lpips", "lower", True, f"tsdsr_jax, {path.name} ({network})", start, smallest=smallest)
