"""From pairs to a prepared training set: their latents, their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax
import numpy as np

from tsdsr_jax.data.crops import EncodedPair
from tsdsr_jax.data.photos import Photograph
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.prompt_files import DEFAULT_PROMPT, PromptEmbeds, read_text
from tsdsr_jax.weights.text_encoders import EncoderOptions, encode_prompts

PromptChoice = Literal["default", "txt", "txt_or_default"]


class ImageEncoder(Protocol):
    """Encodes at most `batch` images at a time; see `latents.LatentEncoder`."""

    batch: int

    def launch(self, positions: Sequence[int], images: Sequence[np.ndarray]) -> jax.Array: ...


class FinishedSample(NamedTuple):
    """A sample with its latent (h, w, C) float32; of one that cannot be made only `problem` is not empty."""

    position: int
    lr: bytes
    hr: bytes
    latent_hr: np.ndarray | None
    problem: str


def add_latents(
    positions: Sequence[int], pairs: Iterator[EncodedPair], encoder: ImageEncoder
) -> Iterator[FinishedSample]:
    """Adds latents, in order; a batch is encoded while the next is made.

    Args:
      positions: of the samples in the plan.
      pairs: one per position.
      encoder: for the latents.
    """
    launched: list[tuple[list[FinishedSample], jax.Array | None]] = []
    waiting: list[FinishedSample] = []
    images: list[np.ndarray] = []

    def launch() -> None:
        good = [sample.position for sample in waiting if not sample.problem]
        launched.append((list(waiting), encoder.launch(good, images) if good else None))
        waiting.clear()
        images.clear()

    def fetch() -> Iterator[FinishedSample]:
        samples, latents = launched.pop(0)
        rows = iter([] if latents is None else np.asarray(latents))
        for sample in samples:
            yield sample if sample.problem else sample._replace(latent_hr=next(rows).copy())

    for position, pair in zip(positions, pairs, strict=True):
        if images and not pair.problem and images[0].shape != pair.image.shape:
            launch()
        waiting.append(FinishedSample(position, pair.lr.tobytes(), pair.hr.tobytes(), None, pair.problem))
        if not pair.problem:
            images.append(pair.image)
        if len(images) == encoder.batch or len(waiting) >= 4 * encoder.batch:
            launch()
        while len(launched) > 1:
            yield from fetch()
    if waiting:
        launch()
    while launched:
        yield from fetch()


# --- prompts --------------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """The photographs' prompts.

    Attributes:
      texts: distinct ones, in the order of their first photograph.
      of: the number of each photograph's text.
    """

    texts: list[str]
    of: list[int]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


def find_prompts(photographs: Sequence[Photograph], choice: PromptChoice) -> Prompts:
    """Reads the `.txt` beside each photograph, or gives all the default prompt.

    Raises:
      UserError: some have none, and the default is not to take its place; they are counted and named.
    """
    found: list[str | None] = [None] * len(photographs)
    if choice != "default":
        files = [photograph.path.with_suffix(".txt") for photograph in photographs]
        # An empty text would be the empty prompt, which nobody writes on purpose.
        found = [(read_text(file) or None) if file.is_file() else None for file in files]
        lacking = [photo.name for photo, text in zip(photographs, found, strict=True) if text is None]
        if lacking and choice == "txt":
            raise UserError(
                f"{len(lacking)} of {len(photographs)} photographs have no text in a .txt beside them: "
                f"{', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}; write them, or give these the default "
                "prompt with --prompts txt_or_default"
            )
    numbers: dict[str, int] = {}
    of = [numbers.setdefault(DEFAULT_PROMPT if text is None else text, len(numbers)) for text in found]
    return Prompts(list(numbers), of)


class Embedder:
    """Texts to embeddings in float16, by SD3's text encoders; those that are known already are not encoded again.

    Args:
      known: text -> its embedding.
      open_encoders: gives the folder of the text encoders, when one is needed.
      options: of the encoders.
    """

    def __init__(
        self, known: dict[str, PromptEmbeds], open_encoders: Callable[[], Path], options: EncoderOptions
    ):
        self.known, self.open_encoders, self.options = known, open_encoders, options
        self._shapes = {(embeds.prompt.shape, embeds.pooled.shape) for embeds in known.values()}

    def __call__(self, texts: Sequence[str]) -> list[PromptEmbeds]:
        """Raises UserError where encoders are missing, a value exceeds float16, or embeddings could not share a batch."""
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
                f"the given default prompt's embedding and those encoded now differ: {told}; encode the default prompt in "
                "the same way, or leave --default_embedding_dir out"
            )
        return [_half(self.known.get(text) or encoded[text], text) for text in texts]


def _half(embeds: PromptEmbeds, text: str) -> PromptEmbeds:
    with np.errstate(over="ignore"):
        prompt, pooled = (part.astype(np.float16, copy=False) for part in (embeds.prompt, embeds.pooled))
    if not (np.isfinite(prompt).all() and np.isfinite(pooled).all()):
        raise UserError(f"the embedding of {text[:60]!r} has values beyond float16's 65504")
    return PromptEmbeds(prompt, pooled)
