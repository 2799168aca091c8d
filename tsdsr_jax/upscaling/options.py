"""The flags that every upscaling command has in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import PATCH_SIZE
from tsdsr_jax.upscaling.engine import Bands
from tsdsr_jax.upscaling.planning import Settings
from tsdsr_jax.upscaling.provenance import as_text, model_in_words
from tsdsr_jax.weights.bundled import LORAS, bundled_model, is_bundled, prompt_folder
from tsdsr_jax.weights.sd3_folder import NetworkFiles

LARGEST_TILE = 64
Say = Callable[[str], object]
GivenOptions = TypeVar("GivenOptions", bound="UpscaleOptions")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """The model, and how it processes photographs."""

    pretrained_model_name_or_path: cli.PathOrName | None = None
    """SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py. Default: the small bundled model."""
    lora_dir: cli.PathOrName | None = None
    """Folder with the LoRAs transformer.safetensors and vae.safetensors, in PEFT's layout or ours; "none" for no LoRA.
    Default: checkpoint/tsdsr; for the bundled model, its own."""
    embedding_dir: Path | None = None
    """Folder with the prompt's embedding: prompt_embeds.pt and pool_embeds.pt, or prompt.safetensors. Default:
    dataset/default; for the bundled model, its own."""
    rank: int | None = 64
    """Expected rank of the transformer's LoRA. Default: any."""
    rank_vae: int | None = 64
    """Expected rank of the autoencoder's LoRA. Default: any."""
    lora_scale: float = 1.0
    """Factor on both LoRAs; below 1 the result stays closer to plain SD3."""
    upscale: float = 4.0
    """Factor by which both sides are enlarged, 1 to 64."""
    process_size: int = 512
    """Shortest side, in pixels, that the network processes. If a result would be smaller, its photograph is processed at
    this size and the result is shrunk."""
    align_method: Literal["wavelet", "adain", "nofix"] = "wavelet"
    """Color correction: take the low frequencies (wavelet) or the mean and contrast (adain) from the photograph; nofix: no
    correction."""
    seed: int = 42
    """Seed of the latent noise, which depends only on the seed and the file's content."""
    latent: Literal["sample", "mode"] = "sample"
    """Draw the latent from the encoder's posterior (sample), or take its mean (mode)."""
    latent_tiled_size: int | None = None
    """Side of the transformer's tiles, in latent pixels (8 pixels of the result each). Default: 64, or less if the model
    has fewer positions."""
    latent_tiled_overlap: int | None = None
    """Overlap of neighboring tiles, in latent pixels. Default: 8, or half of a smaller tile."""
    tile_batch_size: int | None = None
    """Tiles that a device computes together. Default: 8; on a CPU, 1."""
    is_use_tile: bool | None = None
    """Run the autoencoder in bands: the same picture with less memory. Default: only if the whole image does not fit."""
    vae_decoder_tiled_size: int = 64
    """Side of the area that is decoded at a time in bands, in latent pixels. Changes memory and speed, not the result."""
    vae_encoder_tiled_size: int = 512
    """Side of the area that is encoded at a time in bands, in pixels. Changes memory and speed, not the result."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision of the computation. Default: fp16 on a GPU, bf16 on a TPU, fp32 on a CPU."""
    weights: Literal["full", "int8", "fp8"] = "full"
    """How to keep the transformer's blocks. full: in the computation's precision. int8: in half of the memory, for small
    GPUs; no faster. fp8: in half of the memory, and faster on GPUs with fp8 products (Ada, Hopper and newer); less
    accurate."""
    device: str | None = None
    """Where to compute: cuda, cuda:N, cpu or tpu. Default: all devices of the best kind."""
    max_pixels: int = 100_000_000
    """Refuse photographs that have more pixels, before or after upscaling."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""

    def settings(self, platform: str) -> Settings:
        """The flags that every call may change, on devices of this kind."""
        return Settings(
            upscale=self.upscale,
            process_size=self.process_size,
            latent_tile=filled_in(self.latent_tiled_size),
            latent_overlap=filled_in(self.latent_tiled_overlap),
            tile_batch=self.tile_batch_size or several_on(platform),
            sample=self.latent == "sample",
            seed=self.seed,
            align=self.align_method,
            max_pixels=self.max_pixels,
        )

    def made_with(self) -> str:
        """The flags that decide a result, as text to store in it. Precision and devices, which change only the rounding, are
        no part of it."""
        return as_text({
            "pretrained_model_name_or_path": model_in_words(filled_in(self.pretrained_model_name_or_path)),
            "revision": self.revision,
            "lora_dir": model_in_words(filled_in(self.lora_dir)),
            "lora_scale": self.lora_scale,
            "embedding_dir": model_in_words(str(filled_in(self.embedding_dir))),
            "weights": self.weights,
            "upscale": self.upscale,
            "process_size": self.process_size,
            "align_method": self.align_method,
            "latent": self.latent,
            "seed": self.seed if self.latent == "sample" else None,
            "latent_tiled_size": self.latent_tiled_size,
            "latent_tiled_overlap": self.latent_tiled_overlap,
        })  # fmt: skip

    @property
    def bands(self) -> Bands:
        """The flags that set the autoencoder's bands, which are compiled into its programs."""
        if self.is_use_tile is False:
            return Bands(None, None, whole_pixels=None)
        whole_pixels = 0 if self.is_use_tile else None
        return Bands(self.vae_encoder_tiled_size, self.vae_decoder_tiled_size, whole_pixels)


def several_on(platform: str) -> int:
    """How many images or tiles a device of this kind computes together."""
    return 1 if platform == "cpu" else 8


def filled_in(value: Value | None) -> Value:
    """The value of an option that `complete_options` fills in."""
    assert value is not None, "complete_options comes first"
    return value


def complete_options(options: GivenOptions, say: Say = print) -> GivenOptions:
    """Fills in every default that depends on the model, as checking and loading expect.

    Raises:
      UserError: a LoRA without its model, or no model at all.
    """
    model, lora_dir = options.pretrained_model_name_or_path, options.lora_dir
    if model is None:
        model = str(bundled_model())
        say(f"no --pretrained_model_name_or_path: using the small model in {model}")
        if lora_dir is not None:
            raise UserError(
                f"--lora_dir {lora_dir}: give the model it belongs to with --pretrained_model_name_or_path"
            )
    if lora_dir is None:
        lora_dir = str(LORAS) if is_bundled(model) else "checkpoint/tsdsr"
    tile, overlap = options.latent_tiled_size, options.latent_tiled_overlap
    if tile is None:
        tile = _default_tile(model)
    return dataclasses.replace(
        options,
        pretrained_model_name_or_path=model,
        lora_dir=lora_dir,
        embedding_dir=options.embedding_dir or prompt_folder(model, "default"),
        latent_tiled_size=tile,
        latent_tiled_overlap=default_overlap(tile) if overlap is None else overlap,
    )


def default_overlap(tile: int) -> int:
    """The overlap of tiles of this side, in latent pixels."""
    return min(8, tile // 2)


def _default_tile(model: str) -> int:
    """SD3's tile, or as much of it as a model in a local folder has positions for."""
    files = NetworkFiles(Path(os.path.expanduser(model)) / "transformer", "transformer")
    if not (files.folder / "config.json").is_file():  # a hub id, or a mistake that loading will report
        return LARGEST_TILE
    config = files.config
    assert isinstance(config, MMDiTConfig)
    return min(LARGEST_TILE, PATCH_SIZE * config.pos_embed_max_size)


def check_upscale_options(options: UpscaleOptions) -> None:
    """Refuses values that cannot work, before anything is loaded.

    Raises:
      UserError: a flag is out of range.
    """
    tile, overlap = filled_in(options.latent_tiled_size), filled_in(options.latent_tiled_overlap)
    if not 1 <= options.upscale <= 64:
        raise UserError(f"--upscale {options.upscale:g}: expected 1 to 64")
    cli.finite(options)
    if options.process_size < 16:
        raise UserError(f"--process_size {options.process_size}: expected at least 16")
    if tile < PATCH_SIZE or tile % PATCH_SIZE:
        raise UserError(f"--latent_tiled_size {tile}: expected an even number (patches are 2×2)")
    if not 0 <= overlap < tile:
        raise UserError(
            f"--latent_tiled_overlap {overlap}: expected 0 or more, and less than --latent_tiled_size {tile}"
        )
    cli.at_least(options, 1, "tile_batch_size", "vae_decoder_tiled_size", "vae_encoder_tiled_size", "max_pixels", "rank",
                 "rank_vae")  # fmt: skip
    if not -(2**127) <= options.seed < 2**127:
        raise UserError(f"--seed {options.seed}: expected at most 127 bits")


def check_tile(latent_tiled_size: int, largest: int) -> None:
    """Refuses tiles longer than `largest`, the latent pixels that the transformer has positions for."""
    if latent_tiled_size > largest:
        raise UserError(
            f"--latent_tiled_size {latent_tiled_size}: this transformer's position table ends at {largest}"
        )
