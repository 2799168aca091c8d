"""Prompt embeddings on disk, which the transformer reads instead of a text.

Axes: S text tokens (333 = 77 CLIP + 256 T5), D the transformer's `joint_attention_dim` (4096), P its
`pooled_projection_dim` (2048). A folder may have two layouts:

- ours: `prompt.safetensors` with `prompt_embeds` (S, D) and `pooled_embeds` (P,);
- that of the released TSD-SR: `prompt_embeds.pt` (1, S, D) and `pool_embeds.pt` (1, P), read without torch.

This module needs neither torch nor jax. `text_encoders.py` encodes texts; `convert/prompts.py` is the command.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.weights.tensor_files import open_tensors, save_tensors
from tsdsr_jax.weights.torch_pickle import read_tensor

# The text whose embeddings the authors ship. The misspelling is part of the input.
DEFAULT_PROMPT = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, "
    "hyper detailed photo - realistic maximum detail, 32k, Color Grading, ultra HD, extrememeticulous "
    "detailing, skin pore detailing, hyper sharpness, perfect without deformations."
)

SAFETENSORS_NAME = "prompt.safetensors"
TORCH_PROMPT_NAME = "prompt_embeds.pt"
TORCH_POOLED_NAME = "pool_embeds.pt"
TORCH_PROMPT_FOLDER = "prompt_embeds"
TORCH_POOLED_FOLDER = "pool_embeds"
_FLOATS = tuple(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """A text as SD3's encoders see it. Both arrays keep their stored dtype.

    Attributes:
        prompt: (S, D), one row per token.
        pooled: (P,), the whole text in one vector.
    """

    prompt: np.ndarray
    pooled: np.ndarray


def load_prompt_embeds(path: str | os.PathLike[str]) -> PromptEmbeds:
    """Reads a folder in either layout (ours takes precedence), or a single `.safetensors` file.

    Raises:
        UserError: a file is missing or unreadable, or an array has a wrong rank or dtype or is not finite.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of prompt embeddings. {_EXPECTED}")
    if (path / SAFETENSORS_NAME).is_file():
        return _read_safetensors(path / SAFETENSORS_NAME)
    return _read_torch_folder(path)


def check_widths(
    embeds: PromptEmbeds,
    joint_dim: int,
    pooled_dim: int,
    source: str | os.PathLike[str] = "the prompt embeddings",
) -> None:
    """Raises UserError unless `joint_dim` and `pooled_dim` are D and P of the embeddings; the message names `source`."""
    found = embeds.prompt.shape[-1], embeds.pooled.shape[-1]
    if found != (joint_dim, pooled_dim):
        raise UserError(
            f"{os.fspath(source)}: widths {found[0]} (prompt) and {found[1]} (pooled) do not fit the"
            f" transformer's config, which says joint_attention_dim {joint_dim} and pooled_projection_dim"
            f" {pooled_dim}: use embeddings made with this model's own text encoders (convert/prompts.py)."
        )


def save_prompt_embeds(
    folder_or_file: str | os.PathLike[str], embeds: PromptEmbeds, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes an embedding atomically.

    Args:
        folder_or_file: the file, if it ends in `.safetensors`; otherwise a folder for `prompt.safetensors`. Folders are
            created.
        embeds: written in their own dtypes.
        metadata: for the file's header; by convention `text`, if known, and `encoder`, its origin.

    Returns:
        The path of the file.

    Raises:
        UserError: an array has a wrong rank or dtype or is not finite, or the file cannot be written.
    """
    file = target_file(folder_or_file)
    _check(embeds, str(file))
    save_tensors(file, {"prompt_embeds": embeds.prompt, "pooled_embeds": embeds.pooled}, metadata)
    return file


def target_file(folder_or_file: str | os.PathLike[str]) -> Path:
    """The file that `save_prompt_embeds` writes."""
    path = Path(folder_or_file)
    return path if path.suffix == ".safetensors" else path / SAFETENSORS_NAME


def refuse_existing(files: Iterable[Path], overwrite: bool) -> None:
    """Raises UserError, naming the files that exist already, unless they may be overwritten."""
    present = [] if overwrite else [str(file) for file in files if file.exists()]
    if present:
        raise UserError(f"already there: {listed(present)}. Pass --overwrite or another --output.")


def convert_torch_embeds(
    source: str | os.PathLike[str], output: str | os.PathLike[str], overwrite: bool = False
) -> list[Path]:
    """Converts the released code's `.pt` embeddings to safetensors.

    Missing and existing files are found before the first write; each file's content is checked before it is written.

    Args:
        source: a folder with `prompt_embeds.pt` and `pool_embeds.pt`, which become `output/prompt.safetensors`; or a
            training folder with `prompt_embeds/*.pt` and `pool_embeds/*.pt`, of which each pair with the same name
            becomes `output/<name>.safetensors`.
        output: the folder to write to.
        overwrite: replace existing files.

    Returns:
        The written files, in order.

    Raises:
        UserError: a file is missing, lacks its partner, is unreadable or already exists.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of .pt embeddings; expected {_TORCH_LAYOUTS}.")
    folders = source / TORCH_PROMPT_FOLDER, source / TORCH_POOLED_FOLDER
    if any(folder.is_dir() for folder in folders):
        jobs = {output / f"{stem}.safetensors": pair for stem, pair in _pairs(*folders).items()}
    else:
        jobs = {output / SAFETENSORS_NAME: (source / TORCH_PROMPT_NAME, source / TORCH_POOLED_NAME)}
    refuse_existing(jobs, overwrite)
    for target, (prompt, pooled) in jobs.items():
        save_prompt_embeds(
            target, read_torch_pair(prompt, pooled), {"encoder": f"converted from {prompt.name}"}
        )
    return list(jobs)


_TORCH_LAYOUTS = (
    f"{TORCH_PROMPT_NAME} and {TORCH_POOLED_NAME} in it, or pairs of files in {TORCH_PROMPT_FOLDER}/ and"
    f" {TORCH_POOLED_FOLDER}/"
)


_EXPECTED = (
    f"Expected {SAFETENSORS_NAME}, or the released {TORCH_PROMPT_NAME} and {TORCH_POOLED_NAME};"
    " convert/prompts.py makes the first."
)


def read_text(file: Path) -> str:
    """Reads a prompt from a text file.

    Raises:
        UserError: the file cannot be read as UTF-8.
    """
    try:
        # Some editors begin a file with a byte-order mark, which is not part of the prompt.
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}).") from error


def _pairs(prompt_folder: Path, pooled_folder: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs the `.pt` files of two folders by stem, sorted by name."""
    prompts, pooled = (
        {file.stem: file for file in folder.glob("*.pt")} for folder in (prompt_folder, pooled_folder)
    )
    alone = [str(prompts.get(stem) or pooled[stem]) for stem in sorted(prompts.keys() ^ pooled.keys())]
    if alone:
        raise UserError(
            f"{prompt_folder.parent}: every .pt file needs one of the same name in {TORCH_PROMPT_FOLDER}/"
            f" and in {TORCH_POOLED_FOLDER}/. Without a partner: {listed(alone)}. Add or remove them."
        )
    if not prompts:
        raise UserError(f"{prompt_folder} holds no .pt file; expected {_TORCH_LAYOUTS}.")
    return {stem: (prompts[stem], pooled[stem]) for stem in sorted(prompts)}


def _read_torch_folder(folder: Path) -> PromptEmbeds:
    files = folder / TORCH_PROMPT_NAME, folder / TORCH_POOLED_NAME
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {' and '.join(missing)}. {_EXPECTED}")
    return read_torch_pair(*files)


def read_torch_pair(prompt_file: Path, pooled_file: Path) -> PromptEmbeds:
    embeds = PromptEmbeds(
        _without_batch(read_tensor(prompt_file), 2), _without_batch(read_tensor(pooled_file), 1)
    )
    _check(embeds, str(prompt_file), str(pooled_file))
    return embeds


def _read_safetensors(file: Path) -> PromptEmbeds:
    reader = open_tensors(file)
    missing = [name for name in ("prompt_embeds", "pooled_embeds") if name not in reader.specs]
    if missing:
        raise UserError(f"{file} lacks the tensor {' and '.join(missing)}. {_EXPECTED}")
    prompt, pooled = reader.read("prompt_embeds"), reader.read("pooled_embeds")
    embeds = PromptEmbeds(_without_batch(prompt, 2), _without_batch(pooled, 1))
    _check(embeds, str(file))
    return embeds


def _without_batch(array: np.ndarray, rank: int) -> np.ndarray:
    """Drops a leading axis of length 1 if the array has one axis more than `rank`."""
    return array[0] if array.ndim == rank + 1 and array.shape[0] == 1 else array


def _check(embeds: PromptEmbeds, prompt_source: str, pooled_source: str | None = None) -> None:
    checks = (
        (embeds.prompt, 2, "prompt embeddings (tokens, width)", prompt_source),
        (embeds.pooled, 1, "a pooled embedding (width,)", pooled_source or prompt_source),
    )
    for array, rank, expected, source in checks:
        if array.ndim != rank or array.size == 0:
            raise UserError(f"{source}: shape {array.shape}, expected {expected}, at most with a leading 1.")
        if array.dtype not in _FLOATS:
            raise UserError(f"{source}: dtype {array.dtype}, expected floating point for {expected}.")
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise UserError(
                f"{source}: {bad} of {array.size} values of {expected} are NaN or infinite. {_EXPECTED}"
            )
