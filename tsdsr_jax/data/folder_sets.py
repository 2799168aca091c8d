"""Prepared sets in the original's folder layout, with one file per sample and kind.

    ROOT/lr_bicubic/NAME.png         degraded, enlarged to the original size      (H, W, 3)
    ROOT/gt/NAME.png                 the photograph                               (H, W, 3)
    ROOT/latent_hr/NAME.pt           its latent, times the scaling factor         ([1,] C, h, w)
    ROOT/prompt_embeds/NAME.pt       its prompt                                   ([1,] S, D)
    ROOT/pool_embeds/NAME.pt         its pooled prompt                            ([1,] P)

`prompt_embeds/NAME.safetensors`, which `convert/prompts.py` writes, can replace the last two. Any names are allowed, and
images may have any format that `images.files` reads. The files in `lr_bicubic` determine the samples. Names may differ in
their Unicode form.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tsdsr_jax.data.manifest import MANIFEST, check_complete, has_manifest, read_manifest
from tsdsr_jax.data.record import Record, spread
from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.hints import command
from tsdsr_jax.images.display import displayed
from tsdsr_jax.images.files import IMAGE_SUFFIXES, read_photo
from tsdsr_jax.images.search import composed, unread_pictures
from tsdsr_jax.weights.prompt_files import (
    TORCH_POOLED_FOLDER,
    TORCH_PROMPT_FOLDER,
    PromptEmbeds,
    load_prompt_embeds,
    read_torch_pair,
)
from tsdsr_jax.weights.torch_pickle import read_tensor

LR_FOLDER, HR_FOLDER, LATENT_FOLDER = "lr_bicubic", "gt", "latent_hr"
# Training crops are never larger.
_MAX_PIXELS = 64_000_000
_SIZES_IN_FINGERPRINT = 1000


class SampleFiles(NamedTuple):
    """The files of one sample; `pooled` is None if `prompt` is a safetensors file with both embeddings."""

    lr: Path
    hr: Path
    latent_hr: Path
    prompt: Path
    pooled: Path | None


class PreparedFolder:
    """Reads the samples of a folder, in the order of their names.

    Args:
      root: the folder.
      images: whether records have lr and hr; if not, images are not decoded.

    Raises:
      UserError: the folder is missing, empty or not finished, or it names samples that lack files.
    """

    def __init__(self, root: Path, images: bool = True):
        self.images = images
        self.files = _sample_files(root)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, epoch: int = 0) -> Record:
        """Reads one sample, the same in every epoch.

        Raises:
          UserError: a file is missing, damaged, or does not fit the others of the sample.
        """
        files = self.files[index]
        lr, hr = read_images(files) if self.images else (None, None)
        embeds = read_prompt(files)
        return Record(
            lr, hr, read_latent(files.latent_hr), _as_float(embeds.prompt), _as_float(embeds.pooled)
        )

    def name(self, index: int) -> str:
        return str(self.files[index].lr)

    def fingerprint(self) -> str:
        """A hash of all names, the file sizes of up to 1000 samples, and the content of 16, evenly spaced.

        It does not change when the folder moves. Changes to other samples that keep their size go unnoticed.
        """
        digest = hashlib.sha256()
        for files in self.files:
            digest.update(f"{composed(files.lr.name)}\n".encode())
        for indices, content in (
            (spread(len(self), _SIZES_IN_FINGERPRINT), _file_size),
            (spread(len(self)), Path.read_bytes),
        ):
            for index in indices:
                for path in filter(None, self.files[index]):
                    digest.update(content(path))
        return digest.hexdigest()


def _sample_files(root: Path) -> list[SampleFiles]:
    """The samples below one folder, by name.

    Raises:
      UserError: the folder or its parts are missing, or samples are incomplete.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a prepared set")
    made = read_manifest(root) if has_manifest(root) else None
    if made:
        check_complete(root, made)
    if not (root / LR_FOLDER).is_dir():
        raise UserError(f"{root}: has no {LR_FOLDER}/; expected the folders {_ALL_FOLDERS}")
    images = {folder: _images(root / folder) for folder in (LR_FOLDER, HR_FOLDER)}
    if not images[LR_FOLDER]:
        raise UserError(f"{root / LR_FOLDER}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
    twice = [str(root / LR_FOLDER / stem) for stem, paths in images[LR_FOLDER].items() if len(paths) > 1]
    if twice:
        raise UserError(f"{listed(twice)}: several images have this name; keep one of them")
    tensors = {
        folder: {composed(name): root / folder / name for name in _names(root / folder)}
        for folder in (LATENT_FOLDER, TORCH_PROMPT_FOLDER, TORCH_POOLED_FOLDER)
    }
    found, missing = [], defaultdict(list)
    for stem, (lr,) in sorted(images[LR_FOLDER].items()):
        pickled, both = f"{stem}.pt", f"{stem}.safetensors"
        if stem not in images[HR_FOLDER]:
            missing[HR_FOLDER].append(stem)
        if pickled not in tensors[LATENT_FOLDER]:
            missing[LATENT_FOLDER].append(stem)
        together = both in tensors[TORCH_PROMPT_FOLDER]
        if not together:
            for folder in (TORCH_PROMPT_FOLDER, TORCH_POOLED_FOLDER):
                if pickled not in tensors[folder]:
                    missing[folder].append(stem)
        if not missing:
            prompt = tensors[TORCH_PROMPT_FOLDER][both if together else pickled]
            pooled = None if together else tensors[TORCH_POOLED_FOLDER][pickled]
            found.append(
                SampleFiles(lr, images[HR_FOLDER][stem][0], tensors[LATENT_FOLDER][pickled], prompt, pooled)
            )
    if missing:
        lines = [
            f"{root}: {len(images[LR_FOLDER])} images in {LR_FOLDER}/, but files are missing in other folders"
        ]
        lines += [f"  {folder}/ lacks {listed(stems)}" for folder, stems in missing.items()]
        if TORCH_PROMPT_FOLDER in missing:
            lines.append(
                f"  prompts come from convert/prompts.py --prompt_file; see {command('convert/prompts.py', help=True)}"
            )
        raise UserError("\n".join(lines))
    if made and len(found) != sum(made["samples"]):
        raise UserError(
            f"{root}: {len(found)} samples in its folders, {sum(made['samples'])} in {MANIFEST}; files were lost"
        )
    return found


_ALL_FOLDERS = ", ".join((LR_FOLDER, HR_FOLDER, LATENT_FOLDER, TORCH_PROMPT_FOLDER, TORCH_POOLED_FOLDER))


def _images(folder: Path) -> dict[str, list[Path]]:
    """Stem in composed Unicode -> image files, sorted.

    Raises:
      UserError: there are pictures of formats that are not read; without them the set would be another.
    """
    paths = [folder / name for name in sorted(_names(folder)) if not name.startswith(".")]
    if unread := unread_pictures(paths):
        raise UserError(f"{folder}: {unread[0]}")
    found = defaultdict(list)
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found[composed(path.stem)].append(path)
    return dict(found)


def _file_size(path: Path) -> bytes:
    return f"{path.stat().st_size}\n".encode()


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def read_images(files: SampleFiles) -> tuple[np.ndarray, np.ndarray]:
    """lr and hr, both (H, W, 3) uint8."""
    lr, hr = (displayed(read_photo(path, _MAX_PIXELS)) for path in (files.lr, files.hr))
    if lr.shape != hr.shape:
        raise UserError(
            f"{files.lr}: {lr.shape[1]}×{lr.shape[0]} pixels, but {files.hr} has {hr.shape[1]}×{hr.shape[0]}; "
            f"{LR_FOLDER} holds degraded images enlarged to the size of {HR_FOLDER}"
        )
    return lr, hr


def read_prompt(files: SampleFiles) -> PromptEmbeds:
    if files.pooled is None:
        return load_prompt_embeds(files.prompt)
    return read_torch_pair(files.prompt, files.pooled)


def read_latent(path: Path) -> np.ndarray:
    """Reads a ([1,] C, h, w) tensor as (h, w, C) float32."""
    latent = read_tensor(path)
    latent = latent[0] if latent.ndim == 4 and latent.shape[0] == 1 else latent
    if latent.ndim != 3:
        raise UserError(
            f"{path}: shape {latent.shape}; expected a latent (C, h, w), optionally with a leading 1"
        )
    latent = latent.astype(np.float32)
    if not np.isfinite(latent).all():
        raise UserError(f"{path}: has NaN or infinite values; encode this image again")
    return np.ascontiguousarray(latent.transpose(1, 2, 0))


def _as_float(array: np.ndarray) -> np.ndarray:
    """Keeps 16-bit types; converts anything else to float32."""
    return array if array.dtype.itemsize == 2 else array.astype(np.float32)
