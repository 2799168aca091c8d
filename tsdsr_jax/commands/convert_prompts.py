"""Makes prompt embeddings from the released `.pt` files, or from texts with SD3's own text encoders.

    # the released folder, or a training folder with prompt_embeds/*.pt and pool_embeds/*.pt
    python convert/prompts.py --input dataset/default --output dataset/default
    # TSD-SR's default prompt and the empty one, into dataset/default and dataset/null
    python convert/prompts.py --default --null --pretrained_model_name_or_path SD3 --output dataset
    # a text file, or a folder with one .txt per image, into OUTPUT/<name>.safetensors
    python convert/prompts.py --prompt_file texts --pretrained_model_name_or_path SD3 --output embeds --device cuda

Encoding texts needs `pip install 'tsdsr_jax[convert]'`; converting `.pt` files does not.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from tsdsr_jax import cli
from tsdsr_jax.commands.groups import ENCODING
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.prompt_files import (
    DEFAULT_PROMPT,
    convert_torch_embeds,
    load_prompt_embeds,
    read_text,
    refuse_existing,
    save_prompt_embeds,
    target_file,
)
from tsdsr_jax.weights.text_encoders import EncoderOptions, encode_prompts, find_encoders

# Texts to encode before the encoders are loaded again: their results wait in memory, 2.7 MB each in 16 bits.
TEXTS_PER_LOAD = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    output: Path
    """Folder for the embeddings, or a .safetensors file for a single one."""
    input: Path | None = None
    """Folder with .pt embeddings to convert, as released."""
    default: bool = False
    """Encode TSD-SR's default prompt."""
    null: bool = False
    """Encode the empty prompt, for guidance."""
    prompt: str | None = None
    """Encode this text."""
    prompt_file: Path | None = None
    """Encode this text file, or every .txt of this folder."""
    pretrained_model_name_or_path: cli.PathOrName | None = None
    """SD3 in diffusers' layout: a folder, or a hub id (only its text encoders are downloaded)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""
    no_t5: bool = False
    """Leave out T5 and use zeros in its place, as SD3's pipeline does."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Data type of the encoders and of the result."""
    device: str = "cpu"
    """Where to run the encoders: cpu, cuda or cuda:N."""
    max_sequence_length: int = 256
    """Number of T5 tokens."""
    batch_size: int = 8
    """Texts per forward pass."""
    overwrite: bool = False
    """Replace existing files."""


def main() -> None:
    make_embeddings(cli.parse(Options, description=__doc__, groups=ENCODING))


def make_embeddings(options: Options) -> None:
    """Converts or encodes as the options say, and prints each written file with its shapes."""
    _check_modes(options)
    if options.input is not None:
        files = convert_torch_embeds(options.input, options.output, options.overwrite)
    else:
        files = _encode(options, texts_to_encode(options))
    for file in files:
        embeds = load_prompt_embeds(file)
        print(f"{file}: prompt {embeds.prompt.shape}, pooled {embeds.pooled.shape}, {embeds.prompt.dtype}")


def texts_to_encode(options: Options) -> dict[Path, str]:
    """The file to write for each text that the options ask for."""
    if options.default and options.null:
        texts = {"default": DEFAULT_PROMPT, "null": ""}
        return {target_file(options.output / name): text for name, text in texts.items()}
    if options.prompt_file is not None and options.prompt_file.is_dir():
        files = sorted(options.prompt_file.glob("*.txt"))
        if not files:
            raise UserError(f"--prompt_file {options.prompt_file} holds no .txt file.")
        return {options.output / f"{file.stem}.safetensors": read_text(file) for file in files}
    if options.prompt_file is not None:
        return {target_file(options.output): read_text(options.prompt_file)}
    return {target_file(options.output): DEFAULT_PROMPT if options.default else options.prompt or ""}


def _encode(options: Options, texts: dict[Path, str]) -> list[Path]:
    """Encodes `texts` and writes each to its file."""
    refuse_existing(texts, options.overwrite)
    name = options.pretrained_model_name_or_path
    if name is None:
        raise UserError(
            "--pretrained_model_name_or_path is needed to encode texts: a folder or a hub id of SD3."
        )
    run = EncoderOptions(
        dtype=options.dtype,
        device=options.device,
        max_sequence_length=options.max_sequence_length,
        batch_size=options.batch_size,
        use_t5=not options.no_t5,
        variant=options.variant,
    )
    folder = find_encoders(name, options.revision, options.variant, run.use_t5)
    encoder = f"{name} {options.dtype}" + (" without T5" if options.no_t5 else "")
    items = list(texts.items())
    for start in range(0, len(items), TEXTS_PER_LOAD):
        part = items[start : start + TEXTS_PER_LOAD]
        for (file, text), embeds in zip(part, encode_prompts(folder, [t for _, t in part], run), strict=True):
            save_prompt_embeds(file, embeds, {"text": text, "encoder": encoder})
    return list(texts)


def _check_modes(options: Options) -> None:
    modes = {
        "--input": options.input is not None,
        "--default or --null": options.default or options.null,
        "--prompt": options.prompt is not None,
        "--prompt_file": options.prompt_file is not None,
    }
    given = [name for name, present in modes.items() if present]
    if len(given) != 1:
        raise UserError(f"expected exactly one of {', '.join(modes)}; given: {', '.join(given) or 'none'}.")
