"""From the flags that name a model to the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from tsdsr_jax.devices import select_dtype
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.models.folded import ParamTree, fold_parts
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import PATCH_SIZE, STUDENT_TIMESTEP, Tree, abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.upscaling.engine import Engine, LoadedNetworks
from tsdsr_jax.upscaling.options import Say, UpscaleOptions, check_tile, filled_in
from tsdsr_jax.weights.folded_files import folded_shapes, misfit, open_folded
from tsdsr_jax.weights.lora_files import check_rank, load_lora
from tsdsr_jax.weights.prompt_files import PromptEmbeds, check_widths, load_prompt_embeds
from tsdsr_jax.weights.prompt_hints import how_to_encode
from tsdsr_jax.weights.sd3_folder import NetworkFiles, TransformerFiles, check_fit, open_checkpoint
from tsdsr_jax.weights.streaming import load_parts, load_tensors
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec
from tsdsr_jax.weights.torch_names import to_tree


def load_engine(
    options: UpscaleOptions,
    devices: list[jax.Device],
    say: Say = print,
    meanwhile: Callable[[Engine, Event], object] | None = None,
) -> Engine:
    """Checks every file by its header, then loads both networks with their LoRAs merged.

    Args:
      options: complete and checked, see `options`.
      meanwhile: called in another thread while parameters are loaded, with the engine, whose parameters are only shapes
        until then, and an event that is set if loading fails. If it fails itself, nothing happens.

    Raises:
      UserError: files are missing, damaged or do not fit together.
    """
    model = filled_in(options.pretrained_model_name_or_path)
    checkpoint = open_checkpoint(model, options.revision, options.variant)
    transformer, vae = checkpoint.network("transformer"), checkpoint.network("vae")
    transformer_config, vae_config = transformer.config, vae.config
    assert isinstance(transformer_config, MMDiTConfig) and isinstance(vae_config, VAEConfig)
    check_tile(filled_in(options.latent_tiled_size), PATCH_SIZE * transformer_config.pos_embed_max_size)
    check_fit(transformer, vae)
    prompt = _load_prompt(options, transformer_config)
    dtype = select_dtype(options.mixed_precision, devices)
    loras = load_loras(options, transformer, vae, checkpoint.merged, say)
    names = f"{len(devices)} × {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
    say(f"{names}, {jnp.dtype(dtype)}")
    eight_bits = None if options.weights == "full" else options.weights
    folded = _fitting(transformer, prompt, dtype, loras[0], eight_bits, say)
    shapes = _shapes(transformer_config, prompt, dtype, eight_bits, folded), _abstract(vae_config, dtype)
    networks = LoadedNetworks((transformer_config, shapes[0]), (vae_config, shapes[1]), devices)
    engine = Engine(networks, options.bands, jnp.dtype(dtype))
    put = partial(jax.device_put, device=networks.shared)
    specs = folded.specs if folded else transformer.specs, vae.specs
    with _alongside(meanwhile, engine), _progress_bar(*specs) as bar:
        if folded:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), load_tensors(folded, put, bar.update))
        else:
            parts = load_parts(transformer, put, loras[0], options.lora_scale, progress=bar.update)
            text = prompt.prompt, prompt.pooled, STUDENT_TIMESTEP
            params = dict(fold_parts(transformer_config, parts, *text, dtype, eight_bits, networks.shared))
        (vae_params,) = load_parts(vae, put, loras[1], options.lora_scale, dtype, bar.update)
    networks.receive(params, vae_params)
    return engine


@contextmanager
def _alongside(meanwhile: Callable[[Engine, Event], object] | None, engine: Engine) -> Iterator[None]:
    """Runs `meanwhile` in a thread; waits for it, unless there is an error to report."""
    stop, pool = Event(), ThreadPoolExecutor(1)
    try:
        if meanwhile is not None:
            pool.submit(meanwhile, engine, stop)
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=not stop.is_set())


def _shapes(
    config: MMDiTConfig,
    prompt: PromptEmbeds,
    dtype: DTypeLike,
    eight_bits: EightBits | None,
    folded: TensorReader | None,
) -> ParamTree:
    """Shapes of the folded transformer's parameters."""
    if folded:
        leaves = ((path, jax.ShapeDtypeStruct(spec.shape, dtype)) for path, spec in folded.specs.items())
        return to_tree(leaves)
    return folded_shapes(config, prompt, dtype, eight_bits)


def _abstract(config: VAEConfig, dtype: DTypeLike) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(config))


def _fitting(
    transformer: TransformerFiles,
    prompt: PromptEmbeds,
    dtype: DTypeLike,
    lora: Tree | None,
    eight_bits: EightBits | None,
    say: Say,
) -> TensorReader | None:
    """The folded transformer of the checkpoint, if it has one that fits what is asked for; otherwise says why it does not.

    Raises:
      UserError: it does not fit, and there are no weights to fold anew.
    """
    try:
        reader = open_folded(transformer)
    except UserError as error:
        if transformer.is_only_folded:
            raise
        say(f"note: {error}; folding the transformer anew")
        return None
    if reader is None:
        return None
    reason = misfit(reader, transformer, prompt, dtype, lora is not None, eight_bits is not None)
    if reason is None:
        return reader
    if transformer.is_only_folded:
        raise UserError(
            f"{reader.source}: cannot be used, because {reason}; the folder has no other weights, so pass the checkpoint "
            "that it was made from, or the --mixed_precision that it was made for"
        )
    say(f"note: {reader.source} is not used, because {reason}; folding the transformer anew")
    return None


def _progress_bar(*specs: Mapping[str, TensorSpec]) -> tqdm:
    total = sum(int(np.prod(spec.shape)) for part in specs for spec in part.values())
    return tqdm(total=total, desc="loading", unit=" values", unit_scale=True, leave=False, disable=None)


def _load_prompt(options: UpscaleOptions, config: MMDiTConfig) -> PromptEmbeds:
    """Loads the prompt's embedding; UserError if it is missing or does not fit."""
    folder = filled_in(options.embedding_dir)
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
    """Loads the LoRAs in --lora_dir for the transformer and the autoencoder; `merged` names those that the model already
    contains."""
    lora_dir = filled_in(options.lora_dir)
    if lora_dir.lower() in ("none", ""):
        if not merged:
            say("no LoRA: SD3 does not upscale unless TSD-SR's LoRAs are merged into its weights")
        return None, None
    if merged:
        say(
            f"note: this model has LoRAs merged in already ({', '.join(merged)}); --lora_dir is added to them, "
            "as is right for LoRAs that were trained on this model"
        )
    if Path(lora_dir).is_file():
        raise UserError(
            f"{lora_dir}: is a file; --lora_dir must be the folder with transformer.safetensors and vae.safetensors"
        )
    loras = []
    for network, rank, flag in ((transformer, options.rank, "--rank"), (vae, options.rank_vae, "--rank_vae")):
        path = Path(lora_dir) / f"{network.part}.safetensors"
        loras.append(load_lora(path, network.config))
        if rank is not None:
            check_rank(loras[-1], rank, path, flag)
    return loras[0], loras[1]
