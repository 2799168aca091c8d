"""Makes a prepared set: encodes pairs to latents and passes everything to the set's writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from tsdsr_jax.data.crops import EncodedPair, Pairs, Planned, SetLayout
from tsdsr_jax.data.manifest_writer import ManifestWriter
from tsdsr_jax.data.photos import Photographs
from tsdsr_jax.data.workers import read_ahead
from tsdsr_jax.data.writers import FinishedSample, SetWriter
from tsdsr_jax.weights.prompt_files import PromptEmbeds


class ImageEncoder(Protocol):
    """Encodes at most `batch` images at a time; see `latents.LatentEncoder`."""

    batch: int

    def launch(self, positions: Sequence[int], images: Sequence[np.ndarray]) -> jax.Array: ...


class PlannedPairs(NamedTuple):
    """Everything needed to make pairs.

    Attributes:
      photographs: the source of the pairs.
      samples: all samples of the set.
      layout: decides how images are compressed.
      workers: processes that crop and degrade; 0: threads.
    """

    photographs: Photographs
    samples: Sequence[Planned]
    layout: SetLayout
    workers: int


def write_prompts(
    writer: SetWriter,
    manifest: ManifestWriter,
    count: int,
    embed: Callable[[Sequence[str]], list[PromptEmbeds]],
) -> None:
    """Embeds and writes the prompts that this machine's part still lacks; shows a progress bar.

    Args:
      writer, manifest: the set's.
      count: number of prompts, for the progress bar.
      embed: texts -> their embeddings.
    """

    def embed_and_begin(texts: Sequence[str]) -> list[PromptEmbeds]:
        embeds = embed(texts)
        # Only now, so that flags that turn out not to work leave nothing behind.
        manifest.begin()
        return embeds

    with tqdm(total=count, desc="prompts", leave=False, disable=None) as bar:
        writer.write_prompts(embed_and_begin, bar.update)


def write_samples(
    pending: Sequence[int],
    planned: PlannedPairs,
    encoder: ImageEncoder,
    writer: SetWriter,
    manifest: ManifestWriter,
) -> None:
    """Makes and writes the pending samples; shows a progress bar. Samples that cannot be made are noted in the manifest."""
    known_bad = manifest.problems()
    samples = [planned.samples[position] for position in pending]
    pairs = Pairs(planned.photographs, samples, planned.layout)
    with (
        closing(read_ahead(pairs, planned.workers)) as made,
        tqdm(total=len(pending), desc="samples", unit="sample", smoothing=0.05, disable=None) as bar,
    ):
        try:
            for sample in add_latents(pending, made, encoder):
                if sample.problem:
                    tqdm.write(f"left out: {sample.problem}")
                if sample.problem or sample.position in known_bad:
                    manifest.note_problem(sample.position, sample.problem)
                writer.add(sample)
                bar.update()
        finally:
            writer.close()


_NO_LATENT = np.zeros((0, 0, 0), np.float32)


def add_latents(
    positions: Sequence[int], pairs: Iterator[EncodedPair], encoder: ImageEncoder
) -> Iterator[FinishedSample]:
    """Adds latents to pairs, in order. A batch is encoded while the next one is read.

    Args:
      positions: the samples' positions in the plan.
      pairs: one per position.
      encoder: makes the latents.
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
        lr, hr = pair.lr.tobytes(), pair.hr.tobytes()
        waiting.append(FinishedSample(position, lr, hr, _NO_LATENT, pair.problem))
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
