"""The flags that upscaling has in common wherever it runs, and loading the networks they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.devices import select_dtype
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.params import PATCH_SIZE, Tree
from tsdsr_jax.upscaling.engine import Engine, Settings
from tsdsr_jax.weights.bundled import bundled_model, is_bundled, prompt_folder
from tsdsr_jax.weights.lora_files import check_rank, load_lora
from tsdsr_jax.weights.prompt_files import PromptEmbeds, check_widths, load_prompt_embeds
from tsdsr_jax.weights.prompt_hints import how_to_encode
from tsdsr_jax.weights.sd3_folder import NetworkFiles, check_fit, open_checkpoint

LARGEST_TILE = 64
Say = Callable[[str], object]
GivenOptions = TypeVar("GivenOptions", bound="UpscaleOptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """The model, and how photographs go through it."""

    pretrained_model_name_or_path: cli.PathOrName | None = None
    """SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py. Default: the small model in weights/tiny."""
    lora_dir: cli.PathOrName | None = None
    """Folder with transformer.safetensors and vae.safetensors, PEFT's layout or ours; "none": no LoRA. Default:
    checkpoint/tsdsr; weights/tiny has its LoRAs merged in."""
    embedding_dir: Path | None = None
    """Folder with the prompt's embeddings: prompt_embeds.pt and pool_embeds.pt, or prompt.safetensors. Default:
    dataset/default, or weights/tiny's."""
    rank: int | None = 64
    """Rank of the transformer's LoRA; None: whatever it is."""
    rank_vae: int | None = 64
    """Rank of the autoencoder's LoRA; None: whatever it is."""
    lora_scale: float = 1.0
    """Factor on both LoRAs; below 1 stays closer to plain SD3."""
    upscale: float = 4.0
    """Output side over input side, at least 1."""
    process_size: int = 512
    """Photographs whose short side would come out smaller are enlarged to it, and the result shrunk again."""
    align_method: Literal["wavelet", "adain", "nofix"] = "wavelet"
    """Colour fix: take low frequencies (wavelet) or mean and contrast (adain) from the input, or neither."""
    seed: int = 42
    """Seed of the latent noise, which depends on it and on each file's content only."""
    latent: Literal["sample", "mode"] = "sample"
    """Draw the latent from the encoder's posterior, or take its mean."""
    latent_tiled_size: int | None = None
    """Transformer tile, in latent pixels (1/8 of the output's). Default: 64, or all that a smaller model has positions
    for."""
    latent_tiled_overlap: int | None = None
    """Overlap of neighbouring tiles, in latent pixels. Default: 8, or half of a smaller tile."""
    tile_batch_size: int | None = None
    """Tiles per device and call; default: 8, on a CPU 1."""
    is_use_tile: bool | None = None
    """Run the autoencoder band by band: the same picture from less memory. Default: where the whole does not fit."""
    vae_decoder_tiled_size: int = 64
    """In bands: side of the area decoded at a time, in latent pixels; changes memory and speed only."""
    vae_encoder_tiled_size: int = 512
    """In bands: side of the area encoded at a time, in pixels; changes memory and speed only."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Computation; default: fp16 on a GPU, bf16 on a TPU, fp32 on a CPU."""
    weights: Literal["full", "int8", "fp8"] = "full"
    """Keep the transformer's blocks as they are computed, or in eight bits and widen them on use: for small GPUs."""
    device: str | None = None
    """cuda, cuda:N, cpu or tpu; default: all devices of the best kind."""
    max_pixels: int = 100_000_000
    """Refuse photographs whose input or output has more pixels."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File-name variant of the weights, such as fp16."""

    def settings(self, platform: str) -> Settings:
        return Settings(
            upscale=self.upscale,
            process_size=self.process_size,
            latent_tile=self.latent_tiled_size,
            latent_overlap=self.latent_tiled_overlap,
            tile_batch=self.tile_batch_size or several_on(platform),
            encoder_band=None if self.is_use_tile is False else self.vae_encoder_tiled_size,
            decoder_band=None if self.is_use_tile is False else self.vae_decoder_tiled_size,
            whole_pixels=0 if self.is_use_tile else None,
            sample=self.latent == "sample",
        )


def several_on(platform: str) -> int:
    """Images or tiles that a device of this kind computes together rather than one by one."""
    return 1 if platform == "cpu" else 8


def completed(options: GivenOptions, say: Say = print) -> GivenOptions:
    """The options with every default that depends on the model filled in; `check` and `load` expect them so.

    Raises:
      UserError: a LoRA without its model, or no model at all.
    """
    lora_dir = options.lora_dir
    if options.pretrained_model_name_or_path is None:
        folder = bundled_model()
        say(f"no --pretrained_model_name_or_path: using the small model in {folder}")
        options = dataclasses.replace(options, pretrained_model_name_or_path=str(folder))
        if (lora_dir or "none").lower() != "none":
            raise UserError(
                f"--lora_dir {lora_dir}: give the model it belongs to with --pretrained_model_name_or_path; "
                "the small one in weights/tiny has its LoRAs merged in"
            )
    if is_bundled(options.pretrained_model_name_or_path):
        lora_dir = lora_dir or "none"
        if options.lora_scale != 1 and lora_dir.lower() == "none":
            say("--lora_scale has no effect: the small model has its LoRAs merged in")
    tile, overlap = options.latent_tiled_size, options.latent_tiled_overlap
    if tile is None:
        tile = largest_tile(options.pretrained_model_name_or_path)
    return dataclasses.replace(
        options,
        lora_dir="checkpoint/tsdsr" if lora_dir is None else lora_dir,
        embedding_dir=options.embedding_dir
        or prompt_folder(options.pretrained_model_name_or_path, "default"),
        latent_tiled_size=tile,
        latent_tiled_overlap=min(8, tile // 2) if overlap is None else overlap,
    )


def largest_tile(model: str) -> int:
    """SD3's tile, or as much of it as a model that lies here has positions for."""
    files = NetworkFiles(Path(model).expanduser() / "transformer", "transformer")
    if not (files.folder / "config.json").is_file():  # a hub id, or a mistake that `load` tells
        return LARGEST_TILE
    return min(LARGEST_TILE, PATCH_SIZE * files.config.pos_embed_max_size)


def check(options: UpscaleOptions) -> None:
    """Refuses values that cannot work, before anything is loaded.

    Raises:
      UserError: a flag is out of its range.
    """
    if not 1 <= options.upscale <= 64:
        raise UserError(f"--upscale {options.upscale:g}: expected 1 to 64")
    cli.finite(options)
    if options.process_size < 16:
        raise UserError(f"--process_size {options.process_size}: expected at least 16")
    if options.latent_tiled_size < PATCH_SIZE or options.latent_tiled_size % PATCH_SIZE:
        raise UserError(
            f"--latent_tiled_size {options.latent_tiled_size}: expected an even number (patches are 2×2)"
        )
    if not 0 <= options.latent_tiled_overlap < options.latent_tiled_size:
        raise UserError(
            f"--latent_tiled_overlap {options.latent_tiled_overlap}: expected 0 or more, and less than "
            f"--latent_tiled_size {options.latent_tiled_size}"
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


def load(options: UpscaleOptions, settings: Settings, devices: list[jax.Device], say: Say = print) -> Engine:
    """Opens and checks everything by its headers, then loads both networks, LoRAs merged."""
    checkpoint = open_checkpoint(options.pretrained_model_name_or_path, options.revision, options.variant)
    transformer, vae = checkpoint.network("transformer"), checkpoint.network("vae")
    check_tile(options.latent_tiled_size, PATCH_SIZE * transformer.config.pos_embed_max_size)
    check_fit(transformer, vae)
    prompt = load_prompt(options, transformer)
    dtype = select_dtype(options.mixed_precision, devices)
    loras = load_loras(options, transformer, vae, checkpoint.merged, say)
    names = f"{len(devices)} × {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
    say(f"{names}, {jnp.dtype(dtype)}")
    params = []
    total = sum(int(np.prod(spec.shape)) for network in (transformer, vae) for spec in network.specs.values())
    with tqdm(total=total, desc="loading", unit=" values", unit_scale=True, leave=False, disable=None) as bar:
        for network, lora in zip((transformer, vae), loras, strict=True):
            params.append(
                network.load(
                    dtype,
                    lora,
                    options.lora_scale,
                    put=lambda path, array: jax.device_put(array, devices[0]),
                    progress=bar.update,
                    on_host=network is transformer,  # whose folding takes one layer at a time
                )
            )
    return Engine(
        (transformer.config, params[0]),
        (vae.config, params[1]),
        prompt,
        settings,
        dtype,
        devices,
        None if options.weights == "full" else options.weights,
    )


def load_prompt(options: UpscaleOptions, transformer: NetworkFiles) -> PromptEmbeds:
    """The prompt's embedding; UserError where there is none or it does not fit."""
    config, folder = transformer.config, options.embedding_dir
    try:
        prompt = load_prompt_embeds(folder)
    except UserError as error:
        raise UserError(f"{error} {how_to_encode(options, 'default', folder)}") from None
    check_widths(prompt, config.joint_attention_dim, config.pooled_projection_dim, folder)
    return prompt


def load_loras(
    options: UpscaleOptions,
    transformer: NetworkFiles,
    vae: NetworkFiles,
    merged: Sequence[str],
    say: Say = print,
) -> tuple[Tree | None, Tree | None]:
    """The LoRAs of --lora_dir; `merged` are those that the model has in its weights."""
    if options.lora_dir.lower() in ("none", ""):
        if not merged:
            say("no LoRA: plain SD3 is no upscaler, unless TSD-SR's LoRAs are merged into these weights")
        return None, None
    if merged:
        say(
            f"note: this model has LoRAs merged in already ({', '.join(merged)}); --lora_dir is added to them"
        )
    if Path(options.lora_dir).is_file():
        raise UserError(
            f"{options.lora_dir}: is a file; --lora_dir is the folder of transformer.safetensors and vae.safetensors"
        )
    loras = []
    for network, rank, flag in ((transformer, options.rank, "--rank"), (vae, options.rank_vae, "--rank_vae")):
        path = Path(options.lora_dir) / f"{network.part}.safetensors"
        loras.append(load_lora(path, network.config))
        if rank is not None:
            check_rank(loras[-1], rank, path, flag)
    return loras[0], loras[1]
