"""Checkpoints on disk: diffusers folders, hub ids and folders written by `convert/sd3.py`.

A converted folder looks like the diffusers folder that it came from (`transformer/config.json`, `vae/config.json`, ...),
but its weights are in `params.safetensors`, laid out and stacked as this library uses them. If LoRAs were merged into the
weights, `merged.json` names their files. `transformer/folded.safetensors` may hold the transformer folded for a prompt,
beside its weights or instead of them (`folded_files.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.git_lfs import refuse_pointer
from tsdsr_jax.models import lora as lora_lib
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, PATCH_SIZE, Config, Tree
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import torch_names
from tsdsr_jax.weights.finite import is_finite, refuse_broken
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, find_weights, open_tensors

Part = Literal["transformer", "vae"]
PARTS: tuple[Part, ...] = ("transformer", "vae")

ConfigClass = TypeVar("ConfigClass", MMDiTConfig, VAEConfig)

TORCH_STEM = "diffusion_pytorch_model"
PARAMS_FILE = "params.safetensors"
FOLDED_FILE = "folded.safetensors"
MERGED_FILE = "merged.json"
_TORCH_CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """One network of a checkpoint: `folder/config.json` and its weights.

    Attributes:
      folder: `CHECKPOINT/transformer` or `CHECKPOINT/vae`.
      part: which of the two networks.
      variant: file-name variant of torch weights, such as "fp16".
    """

    folder: Path
    part: Part
    variant: str | None = None

    @cached_property
    def config(self) -> Config:
        """The sizes in `config.json`.

        Raises:
          UserError: the file is missing, damaged, or describes another kind of model.
        """
        return self._read_config(MMDiTConfig) if self.part == "transformer" else self._read_config(VAEConfig)

    def _read_config(self, config_class: type[ConfigClass]) -> ConfigClass:
        path = self.folder / "config.json"
        values = read_json(path)
        class_name = values.get("_class_name", _TORCH_CLASSES[self.part])
        if class_name != _TORCH_CLASSES[self.part]:
            raise UserError(f"{path}: describes a {class_name}; expected a {_TORCH_CLASSES[self.part]}")
        try:
            return config_class.from_dict(values)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def is_converted(self) -> bool:
        return (self.folder / PARAMS_FILE).is_file()

    @property
    def is_only_folded(self) -> bool:
        """Whether the folder has the network folded for a prompt, and not its weights."""
        folded = self.folder / FOLDED_FILE
        return folded.is_file() and not self.is_converted and not any(self.folder.glob(f"{TORCH_STEM}*"))

    @cached_property
    def reader(self) -> TensorReader:
        if self.is_converted:
            return open_tensors(self.folder / PARAMS_FILE)
        if self.is_only_folded:
            raise UserError(
                f"{self.folder}: has the transformer only as folded for one prompt ({FOLDED_FILE}), which is all that "
                "upscaling with this prompt needs; everything else needs the checkpoint that it was made from"
            )
        return open_tensors(find_weights(self.folder, TORCH_STEM, self.variant))

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Path, shape and stored dtype of every parameter, checked against the config.

        Raises:
          UserError: tensors are missing, extra or misshapen; the message names all of them.
        """
        if not self.is_converted:
            torch_names.check_base_tensors(self.reader, self.config)
            return torch_names.base_specs(self.reader, self.config)
        expected = {entry.path: entry.shape for entry in torch_names.base_entries(self.config)}
        torch_names.check_names(self.reader.specs, expected, self.reader.source)
        return {path: self.reader.specs[path] for path in expected}

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, array in the stored dtype) one at a time, in the order of `specs`."""
        if not self.is_converted:
            return torch_names.read_base(self.reader, self.config)
        return ((path, self.reader.read(path)) for path in self.specs)

    def check_finite(self) -> None:
        """Reads every tensor once.

        Raises:
          UserError: there are NaNs or infinities; the message names the tensors, in either layout by torch's names.
        """
        if self.is_converted:
            entries = torch_names.base_entries(self.config)
            broken = [name for entry in entries for name in entry.broken(self.reader.view(entry.path))]
        else:
            broken = [name for name in self.reader.specs if not is_finite(self.reader.view(name))]
        refuse_broken(self.reader.source, broken)

    def load(
        self,
        dtype: DTypeLike,
        lora: Tree | None = None,
        lora_scale: float = 1.0,
        put: Callable[[str, np.ndarray], jax.Array] = lambda path, array: jnp.asarray(array),
        progress: Callable[[int], object] = lambda size: None,
    ) -> Tree:
        """Loads all parameters one leaf at a time, and merges an adapter into them.

        Args:
          dtype: of the result.
          lora: adapter to merge, in float32 before the cast to `dtype`.
          lora_scale: factor on the adapter.
          put: (path, host array as stored) -> device array; chooses the device.
          progress: called with each leaf's number of values after it is loaded.

        Raises:
          UserError: the weights do not fit the config, or have NaNs or infinities. Values of a converted folder were
            checked when it was converted and are not checked again.
        """
        pairs = flatten_dict(lora or {}, sep="/")

        def leaf_of(path: str, array: np.ndarray) -> jax.Array:
            pair = lora_lib.pair_of(pairs, path)
            kernel = put(path, array)
            if pair is None:
                return kernel.astype(dtype)
            a, b = (put(path, np.asarray(half)) for half in pair)
            return lora_lib.merge_kernel(kernel, a, b, factor=lora_scale, dtype=jnp.dtype(dtype))

        loaded, broken = [], []
        for entry, (path, array) in zip(torch_names.base_entries(self.config), self.leaves(), strict=True):
            if not self.is_converted:
                broken += entry.broken(array)
            if not broken:  # otherwise the rest is only checked
                loaded.append((path, leaf_of(path, array)))
            progress(array.size)
        refuse_broken(self.reader.source, broken)
        return torch_names.to_tree(loaded)


class TransformerFiles(NetworkFiles):
    """`CHECKPOINT/transformer`."""

    @cached_property
    def config(self) -> MMDiTConfig:
        return self._read_config(MMDiTConfig)


class VAEFiles(NetworkFiles):
    """`CHECKPOINT/vae`."""

    @cached_property
    def config(self) -> VAEConfig:
        return self._read_config(VAEConfig)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An SD3 checkpoint folder, diffusers' or converted."""

    folder: Path
    variant: str | None = None

    @overload
    def network(self, part: Literal["transformer"]) -> TransformerFiles: ...
    @overload
    def network(self, part: Literal["vae"]) -> VAEFiles: ...
    @overload
    def network(self, part: Part) -> NetworkFiles: ...
    def network(self, part: Part) -> NetworkFiles:
        files = TransformerFiles if part == "transformer" else VAEFiles
        return files(self.folder / part, part, self.variant)

    @property
    def merged(self) -> tuple[str, ...]:
        """Files of the LoRAs that are merged into these weights. They make the model a finished upscaler; a base has none.

        Raises:
          UserError: the file that names them is damaged.
        """
        path = self.folder / MERGED_FILE
        if not path.is_file():
            return ()
        files = read_json(path).get("loras")
        if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
            raise UserError(f"{path}: expected a list of LoRA files, as convert/sd3.py --lora_dir writes it")
        return tuple(files)

    @property
    def longest_side(self) -> int:
        """The longest side, in pixels, of an image that the transformer has positions for."""
        return LATENT_FACTOR * PATCH_SIZE * self.network("transformer").config.pos_embed_max_size

    def shift(self) -> float:
        """The noise schedule's shift in `scheduler/scheduler_config.json`; 3, as SD3's, without such a file.

        Raises:
          UserError: the file is damaged or describes another kind of schedule.
        """
        path = self.folder / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            return 3.0
        values = read_json(path)
        if values.get("num_train_timesteps", 1000) != 1000 or not isinstance(
            values.get("shift", 3.0), int | float
        ):
            raise UserError(f"{path}: expected num_train_timesteps 1000 and a number for shift, as in SD3")
        return float(values.get("shift", 3.0))


def check_fit(transformer: NetworkFiles, vae: NetworkFiles) -> None:
    """Raises UserError unless the two networks fit each other and SD3's latents."""
    assert isinstance(transformer.config, MMDiTConfig) and isinstance(vae.config, VAEConfig)
    found = vae.config.latent_channels, vae.config.factor, transformer.config.patch_size
    wanted = transformer.config.in_channels, LATENT_FACTOR, PATCH_SIZE
    if found != wanted or transformer.config.out_channels != transformer.config.in_channels:
        raise UserError(
            f"{transformer.folder.parent}: expected {wanted[0]} latent channels, {wanted[1]} pixels per latent and patches "
            f"of {wanted[2]}; the autoencoder has {found[0]} and {found[1]}, the transformer patches of {found[2]} and "
            f"{transformer.config.out_channels} channels out"
        )


def open_checkpoint(name: str | Path, revision: str | None = None, variant: str | None = None) -> Checkpoint:
    """Opens a checkpoint by its folder or hub id; a hub id is downloaded into huggingface_hub's cache.

    Raises:
      UserError: there is no such folder and no such hub id, or the folder lacks transformer/ or vae/.
    """
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for a user that does not exist
    if not folder.exists():
        folder = _download(str(name), revision, variant)
    if folder.name in PARTS and (folder.parent / PARTS[0]).is_dir() and not (folder / PARTS[0]).is_dir():
        raise UserError(
            f"{folder}: is one network of a checkpoint; pass the whole checkpoint, {folder.parent}"
        )
    for part in PARTS:
        if not (folder / part / "config.json").is_file():
            raise UserError(
                f"{folder}: no {part}/config.json; expected a diffusers SD3 folder or one written by convert/sd3.py"
            )
    return Checkpoint(folder, variant)


def _download(repo_id: str, revision: str | None, variant: str | None) -> Path:
    # Imported here: only hub ids need it, and it takes a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"{repo_id}: no such folder, and not a hub id (owner/name)")
    infix = f".{variant}" if variant else ""
    small = [f"{part}/*.json" for part in PARTS] + ["scheduler/*", "model_index.json", MERGED_FILE]
    weights = [
        *(f"{TORCH_STEM}{infix}.safetensors", f"{TORCH_STEM}{infix}-*-of-*.safetensors"),
        *(f"{TORCH_STEM}-*-of-?????{infix}.safetensors", PARAMS_FILE, FOLDED_FILE),
    ]

    def fetch(names: list[str]) -> Path:
        patterns = [*small, *(f"{part}/{name}" for part in PARTS for name in names)]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(weights)
        if variant is None and not any(folder.glob("*/*.safetensors")):
            # The repository has only variants; `find_weights` takes a single one, or lists the choices.
            folder = fetch([f"{TORCH_STEM}.*.safetensors", f"{TORCH_STEM}*-of-*.safetensors"])
        return folder
    except GatedRepoError:
        raise UserError(
            f"{repo_id}: the repository is gated; accept its license on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo_id}: has no revision {revision!r}; see --revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{repo_id}: neither a folder nor a repository on the hub") from None
    except Exception as error:  # the hub's client does not catch errors of its HTTP library
        reason = first_line(error).removeprefix("Got: ")  # what the hub's client puts before some
        raise UserError(f"{repo_id}: no such folder, and fetching it from the hub failed: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError if the file is missing or holds anything else."""
    try:
        values = json.loads(
            path.read_text(encoding="utf-8-sig")
        )  # editors on Windows begin files with a mark
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def torch_config(config: Config) -> dict[str, Any]:
    """The `config.json` that diffusers expects for this network."""
    values = dataclasses.asdict(config)
    if isinstance(config, MMDiTConfig):
        return {"_class_name": _TORCH_CLASSES["transformer"], **values}
    levels = len(config.block_out_channels)
    return {
        "_class_name": _TORCH_CLASSES["vae"],
        **values,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
