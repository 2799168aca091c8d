"""Converts LoRA files from PEFT's layout, which TSD-SR's released files have, to ours, or from ours to PEFT's.

    python convert/lora.py --input checkpoint/tsdsr --output lora/tsdsr --base sd3
    python convert/lora.py --input lora/tsdsr --output for_pytorch --base sd3

Each file's layout determines the direction. In a folder, the command converts transformer.safetensors, vae.safetensors,
teacher.safetensors and transformer_reg.safetensors. If alpha is the rank, a round trip restores every tensor bit for bit.
Any other alpha is folded into B, and the written file has alpha = rank.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights.finite import STORED_DTYPES, cast_finite
from tsdsr_jax.weights.lora_files import Adapter, is_own_lora, open_lora, save_lora
from tsdsr_jax.weights.lora_names import part_of
from tsdsr_jax.weights.sd3_folder import NetworkFiles, Part
from tsdsr_jax.weights.tensor_files import open_tensors, save_tensors
from tsdsr_jax.weights.torch_names import write_lora

KNOWN_FILES = (
    "transformer.safetensors",
    "vae.safetensors",
    "teacher.safetensors",
    "transformer_reg.safetensors",
)


@dataclasses.dataclass(frozen=True)
class Options:
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """A LoRA file, or a folder of them."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the results; files keep their names."""
    base: Path | None = None
    """Checkpoint folder that the LoRA belongs to; only its config.json files are read. Default: SD3-medium's sizes."""
    dtype: Literal["keep", "float16", "bfloat16", "float32"] = "keep"
    """Data type to store tensors in; keep does not change it."""
    lora_scale: float = 1.0
    """Factor on the LoRAs' strength, folded into B; what infer/upscale.py's flag of this name does for one run."""
    overwrite: bool = False
    """Replace existing files in the output folder."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if not math.isfinite(options.lora_scale):
        raise UserError(f"--lora_scale {options.lora_scale}: expected a finite number")
    for source in _find_files(options.input):
        target = options.output / source.name
        if target.resolve() == source.resolve():
            raise UserError(f"{target}: input and output are the same file; choose another --output")
        if target.exists() and not options.overwrite:
            raise UserError(f"{target}: already exists; pass --overwrite to replace it")
        print(_convert(source, target, options))


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: not found")
    files = [path / name for name in KNOWN_FILES if (path / name).is_file()]
    if not files:
        raise UserError(
            f"{path}: has none of {', '.join(KNOWN_FILES)}; pass the file itself if it has another name"
        )
    return files


def _convert(source: Path, target: Path, options: Options) -> str:
    """Converts one file and returns a line that says what was done."""
    reader, base = open_tensors(source), options.base
    part = part_of(reader.specs)
    config = _read_config(base, part)
    if source.name in KNOWN_FILES and (source.name == "vae.safetensors") != (part == "vae"):
        raise UserError(
            f"{source}: holds a LoRA for the {part}, which contradicts its name; are two files swapped?"
        )
    model = "SD3-medium, the default without --base" if base is None else f"the {part} of {base}"
    adapter = open_lora(source, config, model)
    tree, ours = adapter.tree, is_own_lora(reader)
    if options.lora_scale != 1:
        tree = lora.scale(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree), options.lora_scale)

    def stored(leaf: np.ndarray, given: np.ndarray) -> np.ndarray:
        dtype = given.dtype if options.dtype == "keep" else STORED_DTYPES[options.dtype]
        return cast_finite(np.asarray(leaf), dtype, str(source))

    tree = jax.tree.map(stored, tree, adapter.tree)
    if ours:
        save_tensors(target, write_lora(tree, config), {"format": "pt"})
    else:
        save_lora(target, tree, part)
    return f"{source} -> {target} ({'PEFT' if ours else 'tsdsr_jax'} layout, {part}, {_describe(adapter)})"


def _describe(adapter: Adapter) -> str:
    """The adapter's ranks, and what reading it changed."""
    modules = lora.modules(adapter.tree)
    words = ["rank " + "/".join(str(rank) for rank in sorted(set(modules.values())))]
    if adapter.factors != (1.0,):
        smallest, largest = adapter.factors[0], adapter.factors[-1]
        spread = f"{smallest:g}" if smallest == largest else f"{smallest:g} to {largest:g}"
        words.append(f"alpha/rank {spread} folded in")
    if adapter.filled:
        words.append(f"smaller ranks or missing layers filled with zeros in {len(adapter.filled)} modules")
    return ", ".join(words)


def _read_config(base: Path | None, part: Part) -> Config:
    if base is None:
        return MMDiTConfig.sd3_medium() if part == "transformer" else VAEConfig.sd3()
    return NetworkFiles(base / part, part).config
