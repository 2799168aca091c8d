"""Encodes texts with SD3's three text encoders, in PyTorch: the only step of the pipeline that JAX does not do.

Axes: N texts, S tokens, W1 and W2 the hidden widths of the two CLIP encoders, D T5's width.

    one text -> CLIP-L, 77 tokens:  penultimate states (77, W1), projected pooled state (P1,)
             -> CLIP-G, 77 tokens:  penultimate states (77, W2), projected pooled state (P2,)
             -> T5, 256 tokens:     last states (256, D), without an attention mask, so padding tokens count
    prompt = [CLIP-L | CLIP-G | zeros up to D] over [T5] -> (77 + 256, D);   pooled = [P1 | P2]

Stable Diffusion 3 was conditioned like this; `tests/weights/test_prompts.py` compares the result with diffusers' SD3
pipeline. Each encoder is freed before the next is loaded, so that T5-XXL (9.5 GB in 16 bits) is alone in memory.

It needs torch and transformers (`pip install 'tsdsr_jax[convert]'`) and imports them only to encode.
"""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.git_lfs import refuse_pointer
from tsdsr_jax.weights.prompt_files import PromptEmbeds

if TYPE_CHECKING:
    import torch

CLIP_TOKENS = 77
LONGEST_T5_SEQUENCE = 512
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

_CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
_T5 = ("tokenizer_3", "text_encoder_3")
# transformers 5 makes an almost empty vocabulary if these files are missing, so they are checked first.
_TOKENIZER_FILES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_3": (("tokenizer.json",), ("spiece.model",)),
}
_WEIGHTS = re.compile(
    r"model(?:\.(?P<one>\w+))?\.safetensors|model\.safetensors\.index(?:\.(?P<index>\w+))?\.json"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class EncoderOptions:
    """How to run the encoders.

    Attributes:
        dtype: of the weights, the computation and the result.
        device: a torch device: `cpu`, `cuda` or `cuda:N`.
        max_sequence_length: T5 tokens, including the end token, 1 to 512. TSD-SR uses 256.
        batch_size: texts per forward pass. It changes results only by rounding, because all texts have the same length.
        use_t5: False leaves out T5 and uses zeros in its place, as SD3's pipeline does.
        variant: of the weight files, such as `fp16` for `model.fp16.safetensors`; None: the plain ones, or the only
            ones.
    """

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    device: str = "cpu"
    max_sequence_length: int = 256
    batch_size: int = 8
    use_t5: bool = True
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}.")
        if not 1 <= self.max_sequence_length <= LONGEST_T5_SEQUENCE:
            raise UserError(
                f"--max_sequence_length {self.max_sequence_length}: expected 1 to {LONGEST_T5_SEQUENCE} tokens."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: expected 1 or more.")


def encode_prompts(
    folder: str | Path, texts: Sequence[str], options: EncoderOptions | None = None
) -> list[PromptEmbeds]:
    """Encodes `texts` with the tokenizers and text encoders of a diffusers-layout SD3 folder.

    Args:
        folder: holds `tokenizer`, `tokenizer_2`, `tokenizer_3`, `text_encoder`, `text_encoder_2` and
            `text_encoder_3`. If `model_index.json` says that there is no `text_encoder_3`, or with `use_t5=False`, the
            two T5 folders are not needed, but `transformer/config.json` is, because it has the width of the zeros.
        texts: any number; "" is the empty prompt.
        options: see `EncoderOptions`.

    Returns:
        One embedding per text: prompt (77 + max_sequence_length, D), pooled (P1 + P2,), in `options.dtype`.

    Raises:
        UserError: torch or transformers is not installed, the folder is incomplete, weights and configs disagree, or
            there is no such device.

    Warns:
        UserWarning: a text has more tokens than an encoder takes (the message quotes what is cut off), or the folder
            declares that it has no T5.
    """
    folder, options = Path(folder), options or EncoderOptions()
    use_t5 = options.use_t5 and not _declared_without_t5(folder)
    if options.use_t5 and not use_t5:
        warnings.warn(f"{folder} was saved without T5: zeros take its place", stacklevel=2)
    check_folder(folder, use_t5)
    _require_torch(options.device)
    if not texts:
        return []
    clips = [_encode_clip(folder, *names, texts, options) for names in _CLIPS]
    if use_t5:
        t5_states = _encode_t5(folder, texts, options)
    else:
        t5_states = _t5_zeros(folder, len(texts), options)
    prompts = join_states(clips[0][0], clips[1][0], t5_states)
    pooled = np.concatenate([clips[0][1], clips[1][1]], axis=-1)
    return [PromptEmbeds(prompt, vector) for prompt, vector in zip(prompts, pooled, strict=True)]


def join_states(clip_l: np.ndarray, clip_g: np.ndarray, t5: np.ndarray) -> np.ndarray:
    """Arranges the three encoders' states as the transformer's text tokens.

    Args:
        clip_l: (N, 77, W1).  clip_g: (N, 77, W2).  t5: (N, S, D) with D ≥ W1 + W2.

    Returns:
        (N, 77 + S, D) in t5's dtype: tokens with both CLIP states side by side and zeros after them, then T5's tokens.

    Raises:
        UserError: the CLIP states together are wider than T5's.
    """
    width = clip_l.shape[-1] + clip_g.shape[-1]
    if width > t5.shape[-1]:
        raise UserError(
            f"text_encoder and text_encoder_2 together are {width} wide, text_encoder_3 only {t5.shape[-1]}:"
            " these are not the encoders of one SD3 model; check the folder."
        )
    batch, tokens = clip_l.shape[:2]
    zeros = np.zeros((batch, tokens, t5.shape[-1] - width), t5.dtype)
    return np.concatenate([np.concatenate([clip_l, clip_g, zeros], axis=-1), t5], axis=1)


def check_folder(folder: Path, use_t5: bool) -> None:
    """Raises UserError, naming every missing folder and tokenizer file of the encoders."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an SD3 folder in the diffusers layout.")
    pairs = (*_CLIPS, _T5) if use_t5 else _CLIPS
    missing = [name for pair in pairs for name in pair if not (folder / name).is_dir()]
    for tokenizer, _ in pairs:
        choices = _TOKENIZER_FILES[tokenizer]
        found = any(all((folder / tokenizer / file).is_file() for file in files) for files in choices)
        if tokenizer not in missing and not found:
            missing.append(f"{tokenizer}/({' or '.join(' + '.join(files) for files in choices)})")
    if not missing:
        return
    hint = (
        " or pass --no_t5 to leave T5 out (zeros in its place)" if use_t5 and set(missing) <= set(_T5) else ""
    )
    raise UserError(
        f"{folder} lacks {', '.join(missing)}: expected SD3's tokenizers and text encoders in the diffusers"
        f" layout. Download them{hint}."
    )


def find_encoders(
    name_or_path: str, revision: str | None = None, variant: str | None = None, use_t5: bool = True
) -> Path:
    """Returns a local folder with SD3's tokenizers and text encoders; those of a hub id are downloaded.

    Only these parts are downloaded, into Hugging Face's cache, not the transformer or the autoencoder.

    Raises:
        UserError: it is neither a folder nor a hub id, or the download fails (no network, no such repository or
            revision, a license that has not been accepted).
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not _HUB_ID.fullmatch(name_or_path):
        raise UserError(
            f"--pretrained_model_name_or_path {name_or_path}: no such folder, and not a hub id such as"
            " stabilityai/stable-diffusion-3-medium-diffusers."
        )
    return Path(_download(name_or_path, revision, variant, use_t5))


def has_encoders(name_or_path: str) -> bool:
    """Whether a folder holds SD3's text encoders; hub ids are assumed to."""
    folder = Path(name_or_path)
    return (folder / "text_encoder").is_dir() if folder.is_dir() else bool(_HUB_ID.fullmatch(name_or_path))


def _download(repository: str, revision: str | None, variant: str | None, use_t5: bool) -> str:
    from huggingface_hub import errors, snapshot_download

    wanted, unwanted = _hub_patterns(variant, use_t5)
    where = f"{repository}@{revision}" if revision else repository
    try:
        return snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} is gated: accept its license at https://huggingface.co/{repository}, then run `hf auth"
            " login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where}: no such revision; check --revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such folder, and no such repository on the hub (or a private one: run `hf auth"
            " login`)."
        ) from error
    except Exception as error:  # no network, not in the cache, refused: hub clients raise different types
        raise UserError(
            f"{where}: no such folder, and it cannot be downloaded ({first_line(error)}). Pass a folder, or"
            " connect to the network."
        ) from error


def _hub_patterns(variant: str | None, use_t5: bool) -> tuple[list[str], list[str]]:
    """Patterns of what to download and what to leave out: one set of safetensors weights per encoder."""
    weights = (f"model.{variant}.", f"model.{variant}-") if variant else ("model.safetensors", "model-")
    wanted = ["model_index.json", "transformer/config.json", "tokenizer*/*", "text_encoder*/*.json"]
    wanted += [
        f"text_encoder*/{start}*" if start[-1] in ".-" else f"text_encoder*/{start}" for start in weights
    ]
    return wanted, [] if use_t5 else ["tokenizer_3/*", "text_encoder_3/*"]


def _require_torch(device: str) -> None:
    try:
        import torch
        import transformers  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise UserError(
            f"encoding prompts needs torch and transformers ({first_line(error)}): pip install"
            " 'tsdsr_jax[convert]'"
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: torch cannot use it here ({first_line(error)}).") from error


def _declared_without_t5(folder: Path) -> bool:
    """Whether `model_index.json` lists `text_encoder_3` as [null, null]: a pipeline saved without T5."""
    file = folder / "model_index.json"
    return file.is_file() and _read_json(file).get("text_encoder_3", "absent") in (None, [None, None])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse_pointer(file)
        raise UserError(f"{file} cannot be read as JSON ({error}): copy or download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found a {type(value).__name__}: download it again.")
    return value


def _t5_zeros(folder: Path, count: int, options: EncoderOptions) -> np.ndarray:
    """Zeros of (count, max_sequence_length, D), with D from the transformer's config."""
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise UserError(
            f"{config} is missing: without T5 it is needed for the width of the prompt embeddings."
        )
    width = _read_json(config).get("joint_attention_dim")
    if not isinstance(width, int):
        raise UserError(f"{config} has no joint_attention_dim: expected the config of an SD3 transformer.")
    dtype = ml_dtypes.bfloat16 if options.dtype == "bf16" else DTYPES[options.dtype]
    return np.zeros((count, options.max_sequence_length, width), dtype)


def _encode_clip(
    folder: Path, tokenizer_name: str, encoder_name: str, texts: Sequence[str], options: EncoderOptions
) -> tuple[np.ndarray, np.ndarray]:
    """A CLIP encoder's penultimate states (N, 77, W) and projected pooled states (N, P)."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = _load_tokenizer(CLIPTokenizer, folder / tokenizer_name)
    # Both tokenizers have the same vocabulary, so only one of them warns about cuts.
    ids = _tokenize(tokenizer, texts, CLIP_TOKENS, warn_as="CLIP" if tokenizer_name == "tokenizer" else None)

    def forward(encoder: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = encoder(batch, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    with _loaded(CLIPTextModelWithProjection, folder / encoder_name, options) as encoder:
        states, pooled = _run(encoder, ids, forward, options)
    return states, pooled


def _encode_t5(folder: Path, texts: Sequence[str], options: EncoderOptions) -> np.ndarray:
    """T5's last states (N, max_sequence_length, D), without an attention mask, because SD3 was trained that way."""
    from transformers import T5EncoderModel, T5TokenizerFast

    tokenizer_name, encoder_name = _T5
    tokenizer = _load_tokenizer(T5TokenizerFast, folder / tokenizer_name)
    ids = _tokenize(tokenizer, texts, options.max_sequence_length, warn_as="T5")

    def forward(encoder: Any, batch: torch.Tensor) -> tuple[torch.Tensor]:
        return (encoder(batch).last_hidden_state,)

    with _loaded(T5EncoderModel, folder / encoder_name, options) as encoder:
        return _run(encoder, ids, forward, options)[0]


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for malformed files
        raise UserError(
            f"{folder} cannot be loaded as a tokenizer ({first_line(error)}): download it again."
        ) from error


def _tokenize(tokenizer: Any, texts: Sequence[str], length: int, warn_as: str | None) -> torch.Tensor:
    """Token ids (N, length), padded or cut; warns about cuts, in the name `warn_as`, unless that is None."""
    ids = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    if warn_as is None:
        return ids
    for text, whole in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if len(whole) > length:
            # The last of the `length` tokens is the end token.
            lost = tokenizer.decode(whole[length - 1 : -1], skip_special_tokens=True).strip()
            warnings.warn(
                f"a prompt has {len(whole)} {warn_as} tokens, {warn_as} takes {length}. It does not see the"
                f" end of {text[:40]!r}…: {lost!r}",
                stacklevel=2,
            )
    return ids


@contextmanager
def _loaded(model_class: Any, folder: Path, options: EncoderOptions) -> Iterator[Any]:
    """Yields the encoder in `folder`, ready to run, and frees its memory afterwards."""
    import torch

    encoder = _load_encoder(model_class, folder, options)
    try:
        yield encoder
    finally:
        # The caller still has a reference to the module, so empty it.
        encoder.to("meta")
        gc.collect()
        if torch.device(options.device).type == "cuda":
            torch.cuda.empty_cache()


def _load_encoder(model_class: Any, folder: Path, options: EncoderOptions) -> Any:
    import torch

    variant = _find_variant(folder, options.variant)
    try:
        encoder, report = model_class.from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[options.dtype]),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {model_class.__name__} ({first_line(error)})."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would use random numbers instead
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of {model_class.__name__}, such as {missing[0]}:"
            " expected SD3's own text encoder; check the folder."
        )
    return encoder.eval().to(options.device)


def _find_variant(folder: Path, wanted: str | None) -> str | None:
    """The variant to load: the wanted one; if that is None, the plain weights or the only ones."""
    matches = [match for file in folder.iterdir() if (match := _WEIGHTS.fullmatch(file.name))]
    found = {match["one"] or match["index"] for match in matches}
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found.pop()
    if not found:
        raise UserError(
            f"{folder} holds no model.safetensors or model.safetensors.index.json: download it again."
        )
    names = ", ".join(sorted(str(name) for name in found if name)) or "only the plain ones"
    raise UserError(
        f"{folder} has no weights of --variant {wanted}; available: {names}. Pass one of these, or none."
    )


def _run(
    encoder: Any,
    ids: torch.Tensor,
    forward: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]],
    options: EncoderOptions,
) -> list[np.ndarray]:
    """Runs `forward` over `ids` (N, S) in batches and joins each of its outputs into an array of N rows."""
    import torch

    if int(ids.max()) >= encoder.config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {int(ids.max())}, but {encoder.name_or_path} has only"
            f" {encoder.config.vocab_size}: they do not belong together; check the folder."
        )
    rows = []
    with torch.inference_mode():
        for batch in ids.split(options.batch_size):
            rows.append([_to_numpy(output, options) for output in forward(encoder, batch.to(options.device))])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _to_numpy(tensor: torch.Tensor, options: EncoderOptions) -> np.ndarray:
    import torch

    tensor = tensor.to("cpu", getattr(torch, DTYPES[options.dtype])).contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
