"""SD3's tokenizers and text encoders, tiny and random, saved as diffusers lays them out. Needs torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tsdsr_jax.weights import prompt_files

_SENTENCES = [
    prompt_files.DEFAULT_PROMPT,
    "a photo of a cat on a house",
    "the dog, the sun; the sea!",
    "sharp and detailed",
]


def _write_clip_tokenizer(folder: Path, pad_token: str) -> int:
    """A byte-level vocabulary with a few merges; returns its size."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["a t</w>", "c at</w>", "p h", "o t", "ph ot", "phot o</w>", "t h", "th e</w>"]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": pad_token, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def _write_t5_tokenizer(folder: Path) -> None:
    """A sentencepiece model trained on a handful of sentences, with T5's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True)
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_SENTENCES),
            model_writer=file,
            vocab_size=80,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    config = {"extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))


def save_clip(folder: Path, vocab_size: int, width: int, projection: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        projection_dim=projection,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,  # as in SD3's configs, and as wrong as there: it means "the token with the highest id"
    )
    _save_random(transformers.CLIPTextModelWithProjection(config), folder)


def _save_random(model, folder: Path) -> None:
    """Saves the model with weights large enough for texts to matter to every digit that is compared."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1))
            if parameter.ndim == 1:
                parameter.add_(1.0)
    model.save_pretrained(folder)


def save_text_encoders(
    folder: Path,
    clip_widths: tuple[int, int] = (8, 12),
    projections: tuple[int, int] = (6, 10),
    t5_width: int = 32,
) -> None:
    """Three tokenizers and three encoders below `folder`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = _write_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")
    _write_clip_tokenizer(folder / "tokenizer_2", "!")
    _write_t5_tokenizer(folder / "tokenizer_3")
    for name, width, projection in zip(
        ("text_encoder", "text_encoder_2"), clip_widths, projections, strict=True
    ):
        save_clip(folder / name, size, width, projection)
    config = transformers.T5Config(
        vocab_size=256,
        d_model=t5_width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    _save_random(transformers.T5EncoderModel(config), folder / "text_encoder_3")
