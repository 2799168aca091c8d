"""Metrics from pyiqa (IQA-PyTorch), the package that the paper used. The package is optional and needs PyTorch.

pyiqa downloads weights from the Hugging Face Hub when a metric is first used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tsdsr_jax.errors import first_line
from tsdsr_jax.images.display import displayed
from tsdsr_jax.images.files import read_photo

# The files have been read before, with the user's limit.
_MAX_PIXELS = 2**31


def is_installed() -> bool:
    return importlib.util.find_spec("pyiqa") is not None


@dataclasses.dataclass(frozen=True, eq=False)
class PyIQA:
    """A metric of pyiqa, loaded."""

    model: Any

    @property
    def source(self) -> str:
        return f"pyiqa {version('pyiqa')}"

    @property
    def over_folders(self) -> bool:
        return self.model.metric_name.startswith("fid")

    @property
    def needs_reference(self) -> bool:
        # pyiqa calls FID a metric without reference.
        return self.model.metric_mode == "FR" or self.over_folders

    @property
    def lower_better(self) -> bool:
        return bool(self.model.lower_better)

    def of_pair(self, result: np.ndarray, reference: np.ndarray | None) -> float:
        """The value of (H, W, 3) uint8 pictures."""
        import torch

        pair = (result, reference) if self.needs_reference else (result,)
        tensors = (
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
            for image in pair
            if image is not None
        )
        with torch.no_grad():
            return float(self.model(*tensors))

    def of_folders(self, results: Sequence[Path], references: Sequence[Path]) -> float:
        """The value of two sets of files."""
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):
            folders = []
            for name, files in (("references", references), ("results", results)):
                folder = Path(root, name)
                folder.mkdir()
                for number, file in enumerate(files):
                    _place(file, folder / f"{number:06d}")
                folders.append(str(folder))
            return float(self.model(*folders))


def _place(file: Path, target: Path) -> None:
    """Places a picture where pyiqa, which ignores profiles and alpha, finds it: a link, or a copy in sRGB over white."""
    photo = read_photo(file, _MAX_PIXELS)
    pixels = displayed(photo)
    if pixels is photo.rgb:
        target.with_suffix(file.suffix.lower()).symlink_to(file.resolve())
    else:
        Image.fromarray(pixels).save(target.with_suffix(".png"), compress_level=1)


def load_pyiqa_metric(name: str) -> PyIQA | str:
    """Loads a metric by pyiqa's name, on a GPU if PyTorch has one; returns the reason if it cannot be loaded."""
    # pyiqa logs a line per metric and shows download bars, but standard output is for the table only.
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import pyiqa

            if name not in pyiqa.list_models():
                return f"pyiqa {version('pyiqa')} has no metric of this name; pyiqa.list_models() names them"
            return PyIQA(pyiqa.create_metric(name))
        except Exception as error:  # any failure: a download, a damaged file, a missing package
            return f"pyiqa cannot load it ({first_line(error)}); its weights come from the Hugging Face Hub"
