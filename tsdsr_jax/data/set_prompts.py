"""The prompts of a prepared set: one text per photograph, each distinct text embedded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tsdsr_jax.data.photos import Photograph
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.search import beside
from tsdsr_jax.weights.prompt_files import DEFAULT_PROMPT, PromptEmbeds, read_text
from tsdsr_jax.weights.text_encoders import EncoderOptions, encode_prompts

PromptChoice = Literal["default", "txt", "txt_or_default"]


class Prompts(NamedTuple):
    """The photographs' prompts.

    Attributes:
      texts: the distinct texts, in the order in which the photographs first use them.
      of: the index of each photograph's text.
    """

    texts: list[str]
    of: list[int]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


def find_prompts(photographs: Sequence[Photograph], choice: PromptChoice) -> Prompts:
    """Reads the `.txt` beside each photograph, or gives all of them the default prompt.

    Raises:
      UserError: photographs have no text, and `choice` does not allow the default instead.
    """
    found: list[str | None] = [None] * len(photographs)
    if choice != "default":
        files = [beside(photograph.path, ".txt") for photograph in photographs]
        # An empty file counts as no text: nobody wants the empty prompt on purpose.
        found = [(read_text(file) or None) if file else None for file in files]
        lacking = [photo.name for photo, text in zip(photographs, found, strict=True) if text is None]
        if lacking and choice == "txt":
            raise UserError(
                f"{len(lacking)} of {len(photographs)} photographs have no text in a .txt beside them: "
                f"{', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}; write these texts, or use the default "
                "prompt instead with --prompts txt_or_default"
            )
    numbers: dict[str, int] = {}
    of = [numbers.setdefault(DEFAULT_PROMPT if text is None else text, len(numbers)) for text in found]
    return Prompts(list(numbers), of)


class Embedder:
    """Embeds texts with SD3's text encoders, in float16. Texts with a known embedding are not encoded again.

    Args:
      known: text -> its embedding.
      open_encoders: returns the text encoders' folder; called when they are first needed.
      options: the encoders' options.
    """

    def __init__(
        self, known: dict[str, PromptEmbeds], open_encoders: Callable[[], Path], options: EncoderOptions
    ):
        self.known, self.open_encoders, self.options = known, open_encoders, options
        self._shapes = {(embeds.prompt.shape, embeds.pooled.shape) for embeds in known.values()}

    def __call__(self, texts: Sequence[str]) -> list[PromptEmbeds]:
        """Embeds some texts.

        Raises:
          UserError: the encoders are missing, a value exceeds float16, or embeddings differ in shape and could not share
            a batch.
        """
        new = [text for text in texts if text not in self.known]
        encoded = dict(
            zip(new, encode_prompts(self.open_encoders(), new, self.options) if new else [], strict=True)
        )
        self._shapes |= {(embeds.prompt.shape, embeds.pooled.shape) for embeds in encoded.values()}
        if len(self._shapes) > 1:
            told = " and ".join(
                f"{prompt[0]} tokens of {prompt[1]} (pooled {pooled[0]})" for prompt, pooled in self._shapes
            )
            raise UserError(
                f"the given embedding of the default prompt and the new embeddings differ in shape: {told}; encode the "
                "default prompt in the same way, or omit --default_embedding_dir"
            )
        return [_half(self.known.get(text) or encoded[text], text) for text in texts]


def _half(embeds: PromptEmbeds, text: str) -> PromptEmbeds:
    with np.errstate(over="ignore"):
        prompt, pooled = (part.astype(np.float16, copy=False) for part in (embeds.prompt, embeds.pooled))
    if not (np.isfinite(prompt).all() and np.isfinite(pooled).all()):
        raise UserError(f"the embedding of {text[:60]!r} has values beyond float16's 65504")
    return PromptEmbeds(prompt, pooled)
