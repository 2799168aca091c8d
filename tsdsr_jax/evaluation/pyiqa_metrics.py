"""Metrics of pyiqa (IQA-PyTorch), the package the paper was measured with; optional, and it brings PyTorch.

Its weights come from the Hugging Face Hub at the first use.
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

from tsdsr_jax.errors import first_line


def is_installed() -> bool:
    return importlib.util.find_spec("pyiqa") is not None


@dataclasses.dataclass(frozen=True, eq=False)
class PyIQA:
    """One of its metrics, ready to compute."""

    model: Any

    @property
    def source(self) -> str:
        return f"pyiqa {version('pyiqa')}"

    @property
    def over_folders(self) -> bool:
        return self.model.metric_name.startswith("fid")

    @property
    def needs_reference(self) -> bool:
        # pyiqa counts FID among those without.
        return self.model.metric_mode == "FR" or self.over_folders

    @property
    def lower_better(self) -> bool:
        return bool(self.model.lower_better)

    def of_pair(self, result: np.ndarray, reference: np.ndarray | None) -> float:
        """The value for (H, W, 3) uint8 pictures."""
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
        """The value for two sets of files."""
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):
            folders = []
            for name, files in (("references", references), ("results", results)):
                folder = Path(root, name)
                folder.mkdir()
                for number, file in enumerate(files):
                    # Exactly the files that the other metrics measured.
                    (folder / f"{number:06d}{file.suffix.lower()}").symlink_to(file.resolve())
                folders.append(str(folder))
            return float(self.model(*folders))


def load_pyiqa_metric(name: str) -> PyIQA | str:
    """A metric by pyiqa's name, on a GPU if PyTorch has one; or why it cannot be had."""
    # It writes a line of log for each metric, and its downloads' bars; standard output belongs to the table.
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import pyiqa

            if name not in pyiqa.list_models():
                return f"pyiqa {version('pyiqa')} has no metric of this name; pyiqa.list_models() names them"
            return PyIQA(pyiqa.create_metric(name))
        except Exception as error:  # a download, a damaged file, a missing package: anything at all
            return f"pyiqa cannot load it ({first_line(error)}); its weights come from the Hugging Face Hub"
