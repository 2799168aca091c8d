"""From photographs to a prepared training set: which crops, their pairs, their latents, their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from tsdsr_jax.errors import UserError
from tsdsr_jax.networks import Networks
from tsdsr_jax.options import CROP_STEP
from tsdsr_jax.photos import Box, CropConfig, Photograph, Photographs
from tsdsr_jax.prompts import DEFAULT_PROMPT, PromptEmbeds, read_text
from tsdsr_jax.sharding import batch_sharding
from tsdsr_jax.shards import pack_image
from tsdsr_jax.text_encoders import EncoderOptions, encode_prompts, find_encoders
from tsdsr_jax.torch_weights import Tree

Crops = Literal["random", "grid", "whole"]
PromptChoice = Literal["default", "txt", "txt_or_default"]
Layout = Literal["shards", "folders"]
LONGEST_WEBP = 16383
_NOISE_STREAM = 0x6C617465  # keeps the posteriors' noise apart from other draws


class Planned(NamedTuple):
    """A sample to make.

    Attributes:
      photograph: index of the photograph.
      number: which of its crops.
      box: where it lies; None: at random.
    """

    photograph: int
    number: int
    box: Box | None


def plan(
    photographs: Sequence[Photograph], crops: Crops, config: CropConfig, per_photograph: int = 1
) -> list[Planned]:
    """All samples, in the photographs' order.

    Args:
      photographs: what there is.
      crops: `random`: as many as `per_photograph`, the first of which is what training on the way sees in its first
        epoch, and so on; `grid`: as many as fit side by side, around the centre; `whole`: the photograph, less what
        exceeds multiples of 16 pixels.
      config: the crops' size.
    """
    planned = []
    for index, photograph in enumerate(photographs):
        if crops == "random":
            planned += [Planned(index, number, None) for number in range(per_photograph)]
        else:
            boxes = [_whole(photograph)] if crops == "whole" else _grid(photograph, config)
            planned += [Planned(index, number, box) for number, box in enumerate(boxes)]
    return planned


def _whole(photograph: Photograph) -> Box:
    sides = photograph.height, photograph.width
    height, width = (max(CROP_STEP, side // CROP_STEP * CROP_STEP) for side in sides)
    top, left = (max(0, side - kept) // 2 for side, kept in zip(sides, (height, width), strict=True))
    return Box(top, left, height, width)


def _grid(photograph: Photograph, config: CropConfig) -> list[Box]:
    rows, columns = max(1, photograph.height // config.height), max(1, photograph.width // config.width)
    top, left = (max(0, photograph.height - rows * config.height) // 2,
                 max(0, photograph.width - columns * config.width) // 2)  # fmt: skip
    return [
        Box(top + row * config.height, left + column * config.width, config.height, config.width)
        for row in range(rows)
        for column in range(columns)
    ]


# --- pairs, made by Grain's workers ---------------------------------------------------------------


class Pair(NamedTuple):
    """What a worker makes of a planned sample; of one that cannot be made only `problem` is not empty.

    Attributes:
      lr, hr: (bytes,) uint8, compressed without loss.
      image: hr again, (H, W, 3) uint8.
      problem: what is wrong.
    """

    lr: np.ndarray
    hr: np.ndarray
    image: np.ndarray
    problem: str


class Pairs:
    """The pairs of some planned samples as a sequence for Grain.

    Args:
      source: the photographs.
      samples: what to make.
      layout: `shards` get WebP, `folders` PNG, which the original reads.
    """

    def __init__(self, source: Photographs, samples: Sequence[Planned], layout: Layout):
        self.source, self.samples, self.layout = source, samples, layout
        self.pack = pack_image if layout == "shards" else pack_png

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self.samples[int(index)]
        try:
            lr, hr = self.source.pair(sample.photograph, sample.number, sample.box)
            if self.layout == "shards" and max(hr.shape) > LONGEST_WEBP:
                name = self.source.name(sample.photograph)
                raise UserError(
                    f"{name}: a side exceeds {LONGEST_WEBP} pixels; cut it, or use --layout folders"
                )
        except UserError as error:
            nothing = np.zeros(0, np.uint8)
            return Pair(nothing, nothing, nothing, str(error))
        return Pair(*(np.frombuffer(self.pack(image), np.uint8) for image in (lr, hr)), hr, "")


def pack_png(image: np.ndarray) -> bytes:
    _, file = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    return file.tobytes()


# --- latents --------------------------------------------------------------------------------------


class Encoder:
    """Photographs to latents, on all devices of a mesh.

    Args:
      networks: for the autoencoder and the mesh.
      vae: its parameters.
      batch: images per device.
      seed: of the posteriors' noise.
    """

    def __init__(self, networks: Networks, vae: Tree, batch: int, seed: int):
        self.networks, self.vae, self.seed = networks, vae, seed
        self.batch = batch * networks.mesh.size
        self._rows = batch_sharding(networks.mesh)
        network, scale = networks.autoencoder(), networks.vae.config.scaling_factor

        @jax.jit
        def encode(vae: Tree, images: jax.Array, noise: jax.Array) -> jax.Array:
            images = images.astype(jnp.float32) / 127.5 - 1
            return network.apply({"params": vae}, images, method="encode").sample(noise) * scale

        self._encode = encode

    def noise(self, position: int, height: int, width: int) -> np.ndarray:
        """Of the sample at a position of the plan, (h, w, C), whatever it is encoded together with."""
        factor, channels = self.networks.vae.config.factor, self.networks.vae.config.latent_channels
        generator = np.random.default_rng([_NOISE_STREAM, self.seed, position])
        return generator.standard_normal((height // factor, width // factor, channels), np.float32)

    def launch(self, positions: Sequence[int], images: Sequence[np.ndarray]) -> jax.Array:
        """Starts to encode at most `batch` images (H, W, 3) uint8 of one size; a full batch of latents follows."""
        images = [*images, *[images[-1]] * (self.batch - len(images))]
        positions = [*positions, *[positions[-1]] * (self.batch - len(positions))]
        noise = [self.noise(position, *images[0].shape[:2]) for position in positions]
        put = partial(jax.device_put, device=self._rows)
        return self._encode(self.vae, put(np.stack(images)), put(np.stack(noise)))


class Finished(NamedTuple):
    """A sample with its latent (h, w, C) float32; of one that cannot be made only `problem` is not empty."""

    position: int
    lr: bytes
    hr: bytes
    latent_hr: np.ndarray | None
    problem: str


def finish(positions: Sequence[int], pairs: Iterator[Pair], encoder: Encoder) -> Iterator[Finished]:
    """Adds latents, in order; a batch is encoded while the next is made.

    Args:
      positions: of the samples in the plan.
      pairs: one per position.
      encoder: for the latents.
    """
    launched: list[tuple[list[Finished], jax.Array | None]] = []
    waiting: list[Finished] = []
    images: list[np.ndarray] = []

    def launch() -> None:
        good = [sample.position for sample in waiting if not sample.problem]
        launched.append((list(waiting), encoder.launch(good, images) if good else None))
        waiting.clear()
        images.clear()

    def fetch() -> Iterator[Finished]:
        samples, latents = launched.pop(0)
        rows = iter([] if latents is None else np.asarray(latents))
        for sample in samples:
            yield sample if sample.problem else sample._replace(latent_hr=next(rows).copy())

    for position, pair in zip(positions, pairs, strict=True):
        if images and not pair.problem and images[0].shape != pair.image.shape:
            launch()
        waiting.append(Finished(position, pair.lr.tobytes(), pair.hr.tobytes(), None, pair.problem))
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


def open_encoders(name: str, revision: str | None, options: EncoderOptions) -> Path:
    return find_encoders(name, revision, options.variant, options.use_t5)


def _half(embeds: PromptEmbeds, text: str) -> PromptEmbeds:
    with np.errstate(over="ignore"):
        prompt, pooled = (part.astype(np.float16, copy=False) for part in (embeds.prompt, embeds.pooled))
    if not (np.isfinite(prompt).all() and np.isfinite(pooled).all()):
        raise UserError(f"the embedding of {text[:60]!r} has values beyond float16's 65504")
    return PromptEmbeds(prompt, pooled)
