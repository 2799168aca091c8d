"""Converts an SD3 checkpoint from diffusers' layout to ours, or back with --to_diffusers.

    python convert/sd3.py --input stable-diffusion-3-medium-diffusers --output sd3

Tensors are streamed, so it needs much less memory than the checkpoint's size. --lora_dir merges TSD-SR's LoRAs into the
weights, in float32; use the result with infer/upscale.py --lora_dir none. --fold also stores what upscaling makes of the
transformer and a prompt at every start, so that it starts faster.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import tsdsr_jax
from tsdsr_jax import cli
from tsdsr_jax.atomic import replacing
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.lora import pair_of
from tsdsr_jax.models.params import Tree
from tsdsr_jax.weights.bundled import prompt_folder
from tsdsr_jax.weights.finite import STORED_DTYPES, cast_finite, is_finite
from tsdsr_jax.weights.folded_files import write_folded
from tsdsr_jax.weights.lora_files import load_lora
from tsdsr_jax.weights.prompt_files import PromptEmbeds, check_widths, load_prompt_embeds
from tsdsr_jax.weights.sd3_folder import (
    FOLDED_FILE,
    MERGED_FILE,
    PARAMS_FILE,
    PARTS,
    TORCH_STEM,
    Checkpoint,
    NetworkFiles,
    TransformerFiles,
    open_checkpoint,
    read_json,
)
from tsdsr_jax.weights.tensor_files import TensorSpec, write_tensors
from tsdsr_jax.weights.torch_names import base_entries


@dataclasses.dataclass(frozen=True)
class Options:
    input: Annotated[cli.PathOrName, tyro.conf.arg(aliases=["-i"])]
    """SD3: a diffusers folder or a hub id; with --to_diffusers, a folder that this command wrote."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the converted checkpoint."""
    lora_dir: Path | None = None
    """Folder with LoRAs to merge into the weights: transformer.safetensors and vae.safetensors, in PEFT's layout or ours."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""
    dtype: Literal["keep", "float16", "bfloat16", "float32"] = "keep"
    """Data type to store tensors in; keep does not change it."""
    to_diffusers: bool = False
    """Write diffusers' layout instead of ours."""
    fold: Literal["no", "beside", "only"] = "no"
    """Fold the transformer for one prompt, so that infer/upscale.py starts faster with it: beside the weights, or only the
    folded transformer, a third smaller, which serves nothing but upscaling with this prompt, in this --dtype (or any, from
    float32), and without another LoRA."""
    embedding_dir: Path | None = None
    """Folder with the embedding of the prompt to fold for. Default: as in infer/upscale.py."""
    overwrite: bool = False
    """Replace existing weights in the output folder."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    checkpoint = open_checkpoint(options.input, options.revision, options.variant)
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output}: is a file; --output must be a folder")
    if options.output.resolve() == checkpoint.folder.resolve():
        raise UserError(f"{options.output}: --output is the input checkpoint; choose another folder")
    networks = [checkpoint.network(part) for part in PARTS]
    for network in networks:
        _check(network, options)
        network.specs  # noqa: B018 (checks names and shapes before anything is written)
    prompt = _load_prompt(options, checkpoint)
    loras = [_load_part(options.lora_dir, network) for network in networks]
    for network in networks:
        network.check_finite()
    _mark(options, checkpoint)
    if options.fold != "only":
        (options.output / "transformer" / FOLDED_FILE).unlink(missing_ok=True)
    for network, lora in zip(networks, loras, strict=True):
        if network.part == "transformer" and options.fold == "only":
            _copy_config(network, options.output)
        else:
            _convert(network, lora, options.output / network.part / _weights_name(options), options)
    if prompt:
        _fold(checkpoint.network("transformer"), loras[0], prompt, options)
    if options.fold == "only":  # last: until now, the older weights were whole
        (options.output / "transformer" / PARAMS_FILE).unlink(missing_ok=True)
    _copy_small_files(checkpoint.folder, options.output)
    if not _merged_files(options, checkpoint):  # last: until now, the folder may hold older, merged weights
        (options.output / MERGED_FILE).unlink(missing_ok=True)
    print(
        f"wrote {options.output}: {', '.join(f'{n.part} {_count_values(n) / 1e6:,.1f} M' for n in networks)} parameters"
    )


def _weights_name(options: Options) -> str:
    return f"{TORCH_STEM}.safetensors" if options.to_diffusers else PARAMS_FILE


def _check(network: NetworkFiles, options: Options) -> None:
    """Raises UserError if files would be replaced without --overwrite, or if there is nothing to do."""
    for name in (_weights_name(options), FOLDED_FILE):
        target = options.output / network.part / name
        if target.exists() and not options.overwrite:
            raise UserError(f"{target}: already exists; pass --overwrite to replace it")
    stored = sorted((options.output / "transformer").glob(f"{TORCH_STEM}*")) if options.fold == "only" else []
    if stored:
        raise UserError(
            f"{stored[0]}: --fold only leaves no other weights beside it; choose another --output"
        )
    if options.to_diffusers and options.fold != "no":
        raise UserError("--fold: diffusers has no such layout; leave out --to_diffusers or --fold")
    if options.to_diffusers and not network.is_converted:
        raise UserError(f"{network.folder}: not written by this command; there is nothing to convert back")
    if network.is_converted and not options.to_diffusers and not options.lora_dir and options.fold == "no":
        raise UserError(f"{network.folder}: already converted; --to_diffusers converts it back")


def _load_prompt(options: Options, checkpoint: Checkpoint) -> PromptEmbeds | None:
    """Loads the prompt to fold for; None without --fold.

    Raises:
      UserError: it is missing, does not fit the transformer, or is given without --fold.
    """
    if options.fold == "no":
        if options.embedding_dir:
            raise UserError("--embedding_dir: only --fold needs a prompt")
        return None
    folder, config = (
        options.embedding_dir or prompt_folder(str(options.input), "default"),
        checkpoint.network("transformer").config,
    )
    prompt = load_prompt_embeds(folder)
    check_widths(prompt, config.joint_attention_dim, config.pooled_projection_dim, folder)
    return prompt


def _fold(source: TransformerFiles, lora: Tree, prompt: PromptEmbeds, options: Options) -> None:
    """Writes the folded transformer: of the weights that were just written, or else of the source and its LoRA."""
    select_devices("cpu")  # a GPU's memory may be in use
    target = options.output / "transformer" / FOLDED_FILE
    stored = {spec.dtype for spec in source.specs.values()}
    kept = stored.pop() if len(stored) == 1 else STORED_DTYPES["float32"]
    dtype = kept if options.dtype == "keep" else STORED_DTYPES[options.dtype]
    print(f"folding the transformer for this prompt, in {dtype.name}")
    if options.fold == "only":
        write_folded(target, source, prompt, dtype, lora)
    else:
        written = Checkpoint(options.output).network("transformer")
        write_folded(target, written, prompt, dtype, beside=written.reader)


def _load_part(lora_dir: Path | None, network: NetworkFiles) -> Tree:
    """Reads the network's adapter; empty without --lora_dir."""
    return load_lora(lora_dir / f"{network.part}.safetensors", network.config) if lora_dir else {}


def _convert(network: NetworkFiles, lora: Tree, target: Path, options: Options) -> None:
    """Streams one network's tensors into `target`, then copies its config beside it."""
    leaves = _merged(network.leaves(), lora)
    specs, tensors = _torch_tensors(network, leaves) if options.to_diffusers else (network.specs, leaves)
    if options.dtype != "keep":
        specs = {name: TensorSpec(spec.shape, STORED_DTYPES[options.dtype]) for name, spec in specs.items()}
    # diffusers requires its entry; ours says what wrote the file.
    metadata = (
        {"format": "pt"}
        if options.to_diffusers
        else {"format": "tsdsr_jax", "version": tsdsr_jax.__version__}
    )
    with tqdm(
        total=_count_values(network), desc=network.part, unit=" values", unit_scale=True, disable=None
    ) as bar:
        write_tensors(target, specs, _counted(_cast(tensors, specs), bar), metadata)
    _copy_config(network, options.output)


def _copy_config(network: NetworkFiles, output: Path) -> None:
    with replacing(output / network.part / "config.json") as temporary:
        shutil.copyfile(network.folder / "config.json", temporary)


def _merged(leaves: Iterator[tuple[str, np.ndarray]], lora: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Merges an adapter into the leaves; those that it changes become float32."""
    pairs = flatten_dict(lora, sep="/")
    for path, array in leaves:
        if pair := pair_of(pairs, path):
            a, b = (np.asarray(half, np.float32) for half in pair)
            # Not `lora.merge_kernel`: JAX would reserve a GPU's memory for it.
            with np.errstate(over="ignore", invalid="ignore"):
                array = array.astype(np.float32) + a @ b
            if not is_finite(array):
                raise UserError(
                    f"{path}: exceeds float32's range after the LoRA is merged into it; is the LoRA damaged?"
                )
        yield path, array


def _torch_tensors(
    network: NetworkFiles, leaves: Iterator[tuple[str, np.ndarray]]
) -> tuple[dict[str, TensorSpec], Iterator[tuple[str, np.ndarray]]]:
    """The specs and tensors of a converted network, by their torch names."""
    entries = base_entries(network.config)
    specs = {
        name: TensorSpec(entry.torch_shape, network.specs[entry.path].dtype)
        for entry in entries
        for name in entry.names
    }
    return specs, (
        pair for entry, (_, leaf) in zip(entries, leaves, strict=True) for pair in entry.scatter(leaf)
    )


def _cast(
    tensors: Iterator[tuple[str, np.ndarray]], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, np.ndarray]]:
    """Casts each tensor to its spec's type; raises UserError if a finite value becomes infinite."""
    for name, array in tensors:
        yield name, cast_finite(array, specs[name].dtype, name)


def _counted(tensors: Iterator[tuple[str, np.ndarray]], bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """Passes tensors on and advances the progress bar."""
    for name, array in tensors:
        yield name, array
        bar.update(array.size)


def _count_values(network: NetworkFiles) -> int:
    return sum(int(np.prod(spec.shape)) for spec in network.specs.values())


def _merged_files(options: Options, checkpoint: Checkpoint) -> list[str]:
    """The LoRAs that the written weights contain: those of the input and those merged now."""
    now = [f"{options.lora_dir}/{part}.safetensors" for part in PARTS] if options.lora_dir else []
    return [*checkpoint.merged, *now]


def _mark(options: Options, checkpoint: Checkpoint) -> None:
    """Writes a file that names the LoRAs in the weights, if there are any."""
    if files := _merged_files(options, checkpoint):
        with replacing(options.output / MERGED_FILE) as temporary:
            temporary.write_text(json.dumps({"loras": files}, indent=2) + "\n")


def _copy_small_files(source: Path, output: Path) -> None:
    """Copies the scheduler's config and the model index, so that the folder still describes itself."""
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if (source / name).is_file():
            text = json.dumps(read_json(source / name), indent=2) + "\n"
            with replacing(output / name) as temporary:
                temporary.write_text(text)
