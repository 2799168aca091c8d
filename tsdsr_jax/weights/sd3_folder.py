"""Checkpoints on disk: diffusers folders, hub ids and folders written by `convert/sd3.py`.

A converted folder looks like the diffusers folder it came from (`transformer/config.json`, `vae/config.json`, ...), but
its weights are `params.safetensors`, already laid out and stacked as this library uses them. Where LoRAs were merged into
the weights, `merged.json` names their files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora as lora_lib
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, PATCH_SIZE, Config, Tree
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import torch_names
from tsdsr_jax.weights.finite import is_finite, refuse_broken
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, find_weights, open_tensors

Part = Literal["transformer", "vae"]
PARTS: tuple[Part, ...] = ("transformer", "vae")

TORCH_STEM = "diffusion_pytorch_model"
PARAMS_FILE = "params.safetensors"
MERGED_FILE = "merged.json"
_CONFIG_CLASSES = {"transformer": MMDiTConfig, "vae": VAEConfig}
_TORCH_CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """One network of a checkpoint: `folder/config.json` and its weights.

    Attributes:
      folder: `CHECKPOINT/transformer` or `CHECKPOINT/vae`.
      part: which of the two.
      variant: file-name variant of torch weights, such as "fp16".
    """

    folder: Path
    part: Part
    variant: str | None = None

    @cached_property
    def config(self) -> Config:
        """Raises UserError where `config.json` is missing, damaged, or describes another kind of model."""
        path = self.folder / "config.json"
        values = read_json(path)
        class_name = values.get("_class_name", _TORCH_CLASSES[self.part])
        if class_name != _TORCH_CLASSES[self.part]:
            raise UserError(f"{path}: describes a {class_name}; expected a {_TORCH_CLASSES[self.part]}")
        try:
            return _CONFIG_CLASSES[self.part].from_dict(values)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def is_converted(self) -> bool:
        return (self.folder / PARAMS_FILE).is_file()

    @cached_property
    def reader(self) -> TensorReader:
        if self.is_converted:
            return open_tensors(self.folder / PARAMS_FILE)
        return open_tensors(find_weights(self.folder, TORCH_STEM, self.variant))

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Path, shape and stored dtype of every parameter, checked against the config.

        Raises:
          UserError: missing, extra or misshapen tensors, all of them named.
        """
        if not self.is_converted:
            torch_names.check_base_tensors(self.reader, self.config)
            return torch_names.base_specs(self.reader, self.config)
        expected = {entry.path: entry.shape for entry in torch_names.base_entries(self.config)}
        torch_names.check_names(self.reader.specs, expected, self.reader.source)
        return {path: self.reader.specs[path] for path in expected}

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array in the stored dtype), in the order of `specs`, one at a time."""
        if not self.is_converted:
            return torch_names.read_base(self.reader, self.config)
        return ((path, self.reader.read(path)) for path in self.specs)

    def check_finite(self) -> None:
        """Reads every tensor once.

        Raises:
          UserError: some have values that are NaN or infinite, by torch's names in either layout.
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
        on_host: bool = False,
    ) -> Tree:
        """Loads all parameters, one leaf at a time, merging an adapter on the way.

        Args:
          dtype: what the parameters are kept in.
          lora: merged in float32 before the cast to `dtype`.
          lora_scale: factor on the adapter.
          put: (path, host array as stored) -> device array, to choose devices.
          progress: called with the number of values of each leaf that has been loaded.
          on_host: give NumPy arrays, as stored where nothing is merged into them; what is comes to a device on the way, a
            layer at a time.

        Raises:
          UserError: the weights do not fit the config, or have values that are NaN or infinite. A converted folder's
            values were looked at when it was converted.
        """
        pairs = flatten_dict(lora or {}, sep="/")

        def leaf_of(path: str, array: np.ndarray) -> Any:
            pair = lora_lib.pair_of(pairs, path)
            if pair is None:
                return array if on_host else put(path, array).astype(dtype)
            pair = [np.asarray(half, np.float32) for half in pair]

            def merged(*parts: np.ndarray) -> jax.Array:
                parts = (put(path, part) for part in parts)
                return lora_lib.merge_kernel(*parts, factor=lora_scale, dtype=jnp.dtype(dtype))

            if on_host and array.ndim == 3:  # a run's layers, one at a time
                return np.stack([np.asarray(merged(*layer)) for layer in zip(array, *pair, strict=True)])
            return np.asarray(merged(array, *pair)) if on_host else merged(array, *pair)

        loaded, broken = [], []
        for entry, (path, array) in zip(torch_names.base_entries(self.config), self.leaves(), strict=True):
            if not self.is_converted:
                broken += entry.broken(array)
            if not broken:  # or else the rest is only looked at
                loaded.append((path, leaf_of(path, array)))
            progress(array.size)
        refuse_broken(self.reader.source, broken)
        return torch_names.to_tree(loaded)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An SD3 checkpoint folder, diffusers' or converted."""

    folder: Path
    variant: str | None = None

    def network(self, part: Part) -> NetworkFiles:
        return NetworkFiles(self.folder / part, part, self.variant)

    @property
    def merged(self) -> tuple[str, ...]:
        """Files of the LoRAs in these weights, which make them a finished upscaler; none: a base.

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
        """Of an image, in pixels, that the transformer has positions for."""
        return LATENT_FACTOR * PATCH_SIZE * self.network("transformer").config.pos_embed_max_size

    def shift(self) -> float:
        """The noise schedule's shift, of `scheduler/scheduler_config.json`; SD3's 3 where there is none.

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
            raise UserError(
                f"{path}: expected num_train_timesteps 1000 and a number as shift, as SD3 has them"
            )
        return float(values.get("shift", 3.0))


def check_fit(transformer: NetworkFiles, vae: NetworkFiles) -> None:
    """Raises UserError for two networks not made for each other, or not for super-resolution on SD3's latents."""
    found = vae.config.latent_channels, vae.config.factor, transformer.config.patch_size
    wanted = transformer.config.in_channels, LATENT_FACTOR, PATCH_SIZE
    if found != wanted or transformer.config.out_channels != transformer.config.in_channels:
        raise UserError(
            f"{transformer.folder.parent}: expected {wanted[0]} latent channels, {wanted[1]} pixels a latent and patches of "
            f"{wanted[2]}; the autoencoder has {found[0]} and {found[1]}, the transformer patches of {found[2]} and "
            f"{transformer.config.out_channels} channels out"
        )


def open_checkpoint(name: str | Path, revision: str | None = None, variant: str | None = None) -> Checkpoint:
    """A checkpoint by folder or hub id; a hub id is downloaded into huggingface_hub's cache.

    Raises:
      UserError: no such folder, and not a hub id that can be fetched; or a folder without transformer/ and vae/.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = _download(str(name), revision, variant)
    if folder.name in PARTS and (folder.parent / PARTS[0]).is_dir() and not (folder / PARTS[0]).is_dir():
        raise UserError(
            f"{folder}: is one network of a checkpoint; give the folder around it, {folder.parent}"
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
        raise UserError(f"{repo_id}: no such folder (nor is it a hub id, which reads owner/name)")
    infix = f".{variant}" if variant else ""
    small = [f"{part}/*.json" for part in PARTS] + ["scheduler/*", "model_index.json", MERGED_FILE]
    weights = [
        *(f"{TORCH_STEM}{infix}.safetensors", f"{TORCH_STEM}{infix}-*-of-*.safetensors"),
        *(f"{TORCH_STEM}-*-of-?????{infix}.safetensors", PARAMS_FILE),
    ]

    def fetch(names: list[str]) -> Path:
        patterns = [*small, *(f"{part}/{name}" for part in PARTS for name in names)]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(weights)
        if variant is None and not any(folder.glob("*/*.safetensors")):
            # The repository has variants only; `find_weights` takes the one there is, or names the choice.
            folder = fetch([f"{TORCH_STEM}.*.safetensors", f"{TORCH_STEM}*-of-*.safetensors"])
        return folder
    except GatedRepoError:
        raise UserError(
            f"{repo_id}: the repository is gated; accept its licence on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo_id}: has no revision {revision!r}; see --revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{repo_id}: neither a folder here nor a repository on the hub") from None
    except Exception as error:  # the hub's client lets its HTTP library's errors through
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repo_id}: no such folder, and fetching it from the hub failed: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where the file is missing or holds something else."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def torch_config(config: Config) -> dict[str, Any]:
    """What diffusers expects in `config.json` for this network."""
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
