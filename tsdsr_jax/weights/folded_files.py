"""The folded transformer in a file: `convert/sd3.py --fold` writes it, upscaling uses it if it fits.

`transformer/folded.safetensors` holds the parameters of `models.folded.FoldedMMDiT`, named by their paths. Its header says
what they were folded from and for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from tsdsr_jax.errors import UserError
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.models.folded import FOLD_LAYOUT, ParamTree, fold, fold_parts
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import STUDENT_TIMESTEP, Tree, abstract_params
from tsdsr_jax.weights.finite import is_finite
from tsdsr_jax.weights.prompt_files import PromptEmbeds
from tsdsr_jax.weights.sd3_folder import FOLDED_FILE, TransformerFiles
from tsdsr_jax.weights.streaming import load_parts
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, open_tensors, write_tensors

FOLDED_FORMAT = "tsdsr_jax.folded"
NO_WEIGHTS = "none"

# Why a file cannot be used, by the entry of its header that differs.
_DIFFERENCES = {
    "format": "it is no file of convert/sd3.py --fold",
    "layout": "another version of tsdsr_jax made it",
    "timestep": "it is for another timestep",
    "config": "config.json has changed since it was made",
    "prompt": "it is for another prompt",
    "weights": "it was made from other weights",
}


def open_folded(files: TransformerFiles) -> TensorReader | None:
    """Opens the folded transformer of a folder; None if there is none."""
    path = files.folder / FOLDED_FILE
    return open_tensors(path) if path.is_file() else None


def misfit(
    reader: TensorReader,
    files: TransformerFiles,
    prompt: PromptEmbeds,
    dtype: DTypeLike,
    adapted: bool,
    quantized: bool,
) -> str | None:
    """Why a folded transformer is not what folding anew would give; None if it is.

    Args:
      reader: of the file.
      files: of its folder, which may have the weights that it was folded from.
      prompt: the prompt to upscale with.
      dtype: the dtype in which the transformer is to be kept.
      adapted: whether an adapter is to be merged into the transformer.
      quantized: whether the transformer is to be kept in eight bits.
    """
    if adapted:
        return "it does not contain the LoRA in --lora_dir"
    if quantized:
        return "eight bits are made from the full weights"
    wanted = _header(files.config, prompt)
    if not files.is_only_folded:
        wanted["weights"] = files.reader.fingerprint()
    for name, value in wanted.items():
        if reader.metadata.get(name) != value:
            return _DIFFERENCES[name]
    stored = {spec.dtype for spec in reader.specs.values()}
    # Folding computes in float32, so a file in float32 serves every dtype.
    if stored not in ({np.dtype(dtype)}, {np.dtype(np.float32)}):
        names = ", ".join(sorted(each.name for each in stored))
        return f"it is in {names}, and this run needs {np.dtype(dtype).name}"
    return None


def _header(config: MMDiTConfig, prompt: PromptEmbeds) -> dict[str, str]:
    return {
        "format": FOLDED_FORMAT,
        "layout": str(FOLD_LAYOUT),
        "timestep": str(STUDENT_TIMESTEP),
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "prompt": _hash(prompt),
    }


def _hash(prompt: PromptEmbeds) -> str:
    digest = hashlib.sha256()
    for array in (prompt.prompt, prompt.pooled):
        values = np.ascontiguousarray(array, np.float32)
        digest.update(f"{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def write_folded(
    path: Path,
    files: TransformerFiles,
    prompt: PromptEmbeds,
    dtype: DTypeLike,
    lora: Tree | None = None,
    beside: TensorReader | None = None,
) -> None:
    """Folds a transformer on the CPU and writes it part by part.

    Args:
      path: the file to write.
      files: of the transformer.
      prompt: the prompt to fold for.
      dtype: of the file.
      lora: adapter to merge first.
      beside: the weights that will lie beside the file; it is not used if they become others.

    Raises:
      UserError: values exceed the range of `dtype`, or the weights are damaged.
    """
    config, (device,) = files.config, jax.local_devices(backend="cpu")[:1]
    parts = load_parts(files, partial(jax.device_put, device=device), lora)
    folded = fold_parts(config, parts, prompt.prompt, prompt.pooled, STUDENT_TIMESTEP, dtype)
    header = _header(config, prompt) | {"weights": beside.fingerprint() if beside else NO_WEIGHTS}
    write_tensors(path, _specs(config, prompt, dtype), _leaves(folded, dtype), header)


def folded_shapes(
    config: MMDiTConfig, prompt: PromptEmbeds, dtype: DTypeLike, eight_bits: EightBits | None = None
) -> ParamTree:
    """Shapes and dtypes of a folded transformer's parameters, without computing any."""
    made: ParamTree = jax.eval_shape(
        partial(fold, config, timestep=STUDENT_TIMESTEP, dtype=dtype, eight_bits=eight_bits),
        abstract_params(config),
        prompt.prompt,
        prompt.pooled,
    )
    return made


def _specs(config: MMDiTConfig, prompt: PromptEmbeds, dtype: DTypeLike) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a folded transformer, in the order in which `fold_parts` yields it."""
    made = folded_shapes(config, prompt, dtype)
    blocks = [f"layers_{layer}" for layer in range(config.num_layers)]
    order = [*(name for name in made if name not in blocks), *blocks]
    return {
        path: TensorSpec(leaf.shape, np.dtype(leaf.dtype))
        for name in order
        for path, leaf in flatten_dict({name: made[name]}, sep="/").items()
    }


def _leaves(folded: Iterator[tuple[str, Tree]], dtype: DTypeLike) -> Iterator[tuple[str, np.ndarray]]:
    for name, tree in folded:
        for path, leaf in flatten_dict({name: tree}, sep="/").items():
            array = np.asarray(leaf)
            if not is_finite(array):
                raise UserError(
                    f"{path}: has values outside the range of {np.dtype(dtype).name} after folding; choose --dtype bfloat16 "
                    "or float32"
                )
            yield path, array
